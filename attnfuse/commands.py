"""The commands: ``attnfuse rewrite``, ``explain``, ``kernels``, ``tune`` and ``demo``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch.export import ExportedProgram

from attnfuse import demo as demonstration
from attnfuse import pt2, tuning
from attnfuse.atomic import replacing
from attnfuse.candidates import Asked, Sizes, problem_of, problems_in
from attnfuse.errors import BadInput
from attnfuse.exits import table
from attnfuse.kernels import Candidate, Numerics, choose, kernels, lookup, measured
from attnfuse.outputs import check_places, why_unverifiable, write
from attnfuse.passes.certify import Effort
from attnfuse.picture import as_dot, as_svg, as_text
from attnfuse.report import Certificate, Report
from attnfuse.screen import show_certificate, show_report, show_rows, stage
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = ["app"]

Dtype = Literal["float32", "float16", "bfloat16"]
DEFAULT_SIZES = "1,16,16,2048,2048,64"

_HELP = f"""Finds hand-written attention in exported PyTorch programs, proves it, and fuses it.

\b
Exit codes:
{table()}
"""

app = typer.Typer(help=_HELP, rich_markup_mode=None, add_completion=False, no_args_is_help=True,
                  context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})  # fmt: skip

Source = Annotated[Path, typer.Argument(metavar="IN", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-input", help="Load IN even if that runs code which it brings along.")]
Import = Annotated[list[str] | None, typer.Option("--import", metavar="MODULE", show_default=False,
                                                  help="A library whose types or operators IN uses.")]  # fmt: skip
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write.", show_default=False)]
Only = Annotated[str | None, typer.Option("--kernel", metavar="K", help="This kernel or none; see `attnfuse kernels`.")]
Rows = Annotated[Numerics, typer.Option("--numerics", help="What fully masked rows may become.")]
Tested = Annotated[Effort, typer.Option("--certify", help="How hard each fusion is tested before it is kept.")]
CustomOp = Annotated[bool, typer.Option("--custom-op", help="Keep attnfuse::attention, which needs attnfuse.")]
Float8 = Annotated[bool, typer.Option("--fp8-attention", help="Round to float8 where faster.")]
Unverified = Annotated[bool, typer.Option("--no-verify", help="Do not run IN and OUT against each other.")]
ReportPath = Annotated[Path | None, typer.Option("--report", metavar="F", help="Also write a JSON report.")]
After = Annotated[str | None, typer.Option("--print-after", metavar="STAGE", help="Print the graph after this stage.")]
Aim = Annotated[str | None, typer.Option("--target", metavar="T", show_default="where IN's tensors are",
                                         help="cpu, cuda:sm90, rocm:gfx942, xpu:pvc...")]  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnfuse {__version__}")
        raise typer.Exit


@app.callback()
def attnfuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What all commands share."""


@app.command(short_help="Fuse the attention in a .pt2.")
def rewrite(
    source: Source,
    output: Output,
    target: Aim = None,
    kernel: Only = None,
    numerics: Rows = "faithful",
    certify: Tested = "quick",
    custom_op: CustomOp = False,
    fp8_attention: Float8 = False,
    no_verify: Unverified = False,
    report_path: ReportPath = None,
    print_after: After = None,
    modules: Import = None,
    trust_input: Trust = False,
) -> None:
    """Fuse the attention in IN, a .pt2, and write the result to OUT.

    OUT is made of ATen operators alone, so it loads without attnfuse. It is written when all went well
    and not at all otherwise.
    """
    aim = _target_of(target)
    if kernel is not None:
        lookup(kernel)
    check_places(source, output, report_path)
    program = _read(source, modules, trust_input=trust_input)
    with stage("fusing"):
        result, report = pt2.rewrite(
            program, target=aim, custom_op=custom_op, kernel=kernel, numerics=numerics, certify=certify,
            print_after=print_after, fp8_attention=fp8_attention,
        )  # fmt: skip
    asked = "--no-verify was given" if no_verify else ""
    reason = asked or why_unverifiable(report, aim, custom_op=custom_op, fp8_attention=fp8_attention)
    with stage("verifying"):
        resample = numerics == "faithful"
        certificate = Certificate(skipped=reason) if reason else pt2.check(program, result, resample=resample)
    with stage(f"writing {output}"):
        write(result, output, report, certificate, report_path)
    show_report(report)
    show_certificate(certificate)


@app.command(short_help="Say what would be fused in a .pt2, and why the rest would not.")
def explain(
    source: Source,
    target: Aim = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    layouts: Annotated[bool, typer.Option("--layouts", help="Also say where transposes would go, and why.")] = False,
    dot: Annotated[Path | None, typer.Option(metavar="F", help="Draw that, for graphviz.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="F", help="Draw that; needs graphviz.")] = None,
    custom_op: Annotated[bool, typer.Option("--custom-op", help="As if with rewrite's --custom-op.")] = False,
    modules: Import = None,
    trust_input: Trust = False,
) -> None:
    """Say of each attention in IN, a .pt2, whether it would be fused, and if not, why and where."""
    aim = _target_of(target)
    check_places(source, dot, svg)
    program = _read(source, modules, trust_input=trust_input)
    with stage("looking for attention"):
        _, report = pt2.rewrite(program, target=aim, custom_op=custom_op)
    _draw(report, dot, svg)
    if as_json:
        typer.echo(report.to_json())
        return
    show_report(report)
    if layouts:
        typer.echo(f"\n{as_text(report.regions)}")


@app.command("kernels", short_help="List the kernels, or judge them for one attention.")
def list_kernels(
    what: Annotated[
        str | None, typer.Option("--for", metavar="SPEC", help="A .pt2, a spec, or a score in s, m, n.")
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="B,H,Hkv,M,N,D", help="For a SPEC that is no .pt2.")] = DEFAULT_SIZES,
    dtype: Annotated[Dtype, typer.Option(help="For a SPEC that is no .pt2.")] = "float32",
    target: Aim = None,
    modules: Import = None,
    trust_input: Trust = False,
) -> None:
    """List the kernels; with --for, each one's estimated time for SPEC, or why it cannot compute it.

    SPEC is for example 'where(n <= m, 0.125 * s, -inf)': causal attention with a scale.
    """
    aim = _target_of(target)
    if what is None:
        doc = {name: (type(each).__doc__ or "").strip().partition("\n")[0] for name, each in kernels().items()}
        show_rows(("kernel", "devices", ""), [(n, ", ".join(e.devices), doc[n]) for n, e in kernels().items()])
        return
    for site in _asked(what, sizes, dtype, modules, trust_input=trust_input):
        place = aim or site.target
        typer.echo(f"{site.name}: {site.problem.words} on {place}")
        show_rows(("kernel", "estimate", "because"), map(_candidate_row, choose(site.problem, place).candidates))


@app.command(short_help="Measure the kernels on this machine, and choose by that from now on.")
def tune(
    what: Annotated[
        str | None, typer.Argument(metavar="[IN|SPEC]", show_default="usual attention at usual sizes")
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="B,H,Hkv,M,N,D", help="For a SPEC.")] = DEFAULT_SIZES,
    dtype: Annotated[Dtype, typer.Option(help="For a SPEC.")] = "float32",
    target: Aim = None,
    training: Annotated[bool, typer.Option("--training", help="With the backward.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--eager",
            show_default="compiled, but not a .pt2",
            help="Whether the graph around the attention will be compiled.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each kernel is timed.")] = 0.2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show, and keep nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all that was measured, and do no more.")] = False,
    modules: Import = None,
    trust_input: Trust = False,
) -> None:
    """Time every kernel that can compute the attention in IN, a .pt2, or a SPEC, and the graph as it is.

    What is measured corrects the estimates that kernels are chosen by, for this device, these versions and attention
    of about these sizes; of kernels that have schedules, the fastest is found. It is kept in $ATTNFUSE_CACHE, else in
    attnfuse in the user's cache directory. ATTNFUSE_CALIBRATE=0 chooses without it.
    """
    aim = _target_of(target)
    if clear:
        typer.echo(f"files deleted: {measured.clear()}")
        return
    asked = (
        tuning.standard(aim or Target.current())
        if what is None
        else _asked(what, sizes, dtype, modules, trust_input=trust_input)
    )
    wanted = tuning.Wanted(aim, training, compiled if compiled is not None else not _is_program(what), seconds)
    tuning.run(asked, wanted, dry_run=dry_run)


@app.command(short_help="See it work on a small decoder, here and now.")
def demo() -> None:
    """Export a small decoder, fuse its attention, verify it and time both, here and now."""
    demonstration.run()


def _is_program(what: str | None) -> bool:
    return what is not None and (what.endswith(".pt2") or Path(what).is_file())


def _asked(what: str, sizes: str, dtype: Dtype, modules: list[str] | None, *, trust_input: bool) -> Iterator[Asked]:
    """The problems of a .pt2, or the one that a SPEC is."""
    if _is_program(what):
        return problems_in(_read(Path(what), modules, trust_input=trust_input))
    problem = problem_of(what, Sizes.parse(sizes), getattr(torch, dtype))
    return iter([Asked("attention", problem, Target.current())])


def _draw(report: Report, dot: Path | None, svg: Path | None) -> None:
    drawings = {path: draw for path, draw in ((dot, as_dot), (svg, as_svg)) if path is not None}
    contents = {path: draw(report.regions) for path, draw in drawings.items()}
    for path, content in contents.items():
        with replacing(path) as file:
            file.write(content)


def _read(source: Path, modules: list[str] | None, *, trust_input: bool) -> ExportedProgram:
    for module in modules or ():
        _import(module)
    with stage(f"reading {source}"):
        return pt2.load(source, trust_input=trust_input)


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise BadInput(f"cannot import {module}: {error}") from error


def _target_of(source: str | None) -> Target | None:
    return None if source is None else Target.parse(source)


def _candidate_row(candidate: Candidate) -> tuple[str, ...]:
    time = "" if candidate.seconds is None else f"{1e3 * candidate.seconds:.3g} ms"
    return candidate.name, time, "; ".join(candidate.reasons)
