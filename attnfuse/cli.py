"""The command line: ``attnfuse rewrite``, ``explain``, ``kernels`` and ``demo``."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
import torch

from attnfuse import demo as demonstration
from attnfuse import pt2
from attnfuse.atomic import replacing
from attnfuse.candidates import Sizes, problem_of, problems_in
from attnfuse.errors import AttnfuseError, BadInput, BadProgram, NoKernel, NotEquivalent, Refused
from attnfuse.form import describe
from attnfuse.kernels import Candidate, Numerics, choose, kernels, lookup
from attnfuse.report import Certificate, Report
from attnfuse.screen import show_certificate, show_report, show_rows, stage
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = ["main", "run"]

#: Exit codes of errors raised on purpose; the first class that fits decides.
_EXITS: tuple[tuple[type[AttnfuseError], int], ...] = (
    (BadInput, 3),
    (BadProgram, 3),
    (NoKernel, 4),
    (Refused, 4),
    (NotEquivalent, 5),
)
_HELP = """Finds hand-written attention in exported PyTorch programs, proves it, and fuses it.

\b
Exit codes:
    0  done
    1  a bug in attnfuse; ATTNFUSE_TRACEBACK=1 shows where
    2  a command or option that does not exist, or is used wrongly
    3  a file or value that cannot be used; nothing was written
    4  no kernel can compute what was asked for; nothing was written
    5  the rewritten program did not verify; nothing was written
  130  interrupted; nothing was written
"""

_source = click.argument("source", metavar="IN", type=click.Path(path_type=Path))
_trust = click.option("--trust-input", is_flag=True, help="Load IN even if that runs code which it brings along.")
_target = click.option("--target", metavar="T", help="cpu, cuda:sm90, rocm:gfx942, xpu:pvc... [default: this machine]")


def main() -> None:
    """The ``attnfuse`` command."""
    # torch warns of its own internals while it reads and copies programs
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of ``attnfuse`` with ``arguments``; an error is one line on the standard error."""
    try:
        return int(attnfuse.main(list(arguments), prog_name="attnfuse", standalone_mode=False) or 0)
    except click.ClickException as error:
        return _failed(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted; nothing was written", 130)
    except BrokenPipeError:
        # the reader has gone; so that Python does not complain of it at exit, nothing more is written there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AttnfuseError as error:
        return _failed(str(error), next(code for kind, code in _EXITS if isinstance(error, kind)))
    except Exception as error:  # noqa: BLE001  # the last door: a bug is one line too, and says how to see more
        if os.environ.get("ATTNFUSE_TRACEBACK"):
            traceback.print_exc()
        return _failed(f"internal error, please report it: {type(error).__name__}: {error}", 1)


def _failed(message: str, code: int) -> int:
    click.echo(f"attnfuse: {' '.join(message.split())}", err=True)
    return code


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="attnfuse")
def attnfuse() -> None:
    """The group of all commands."""


@attnfuse.command()
@_source
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), required=True, help="Where to write.")
@_target
@click.option("--kernel", metavar="K", help="Use this kernel or none; `attnfuse kernels` lists them.")
@click.option("--numerics", type=click.Choice(["faithful", "fast"]), default="faithful", show_default=True)
@click.option("--certify", type=click.Choice(["full", "quick", "off"]), default="quick", show_default=True,
              help="How hard each fusion is tested before it is kept.")  # fmt: skip
@click.option("--custom-op", is_flag=True, help="Keep attnfuse::attention in OUT, which then needs attnfuse to load.")
@click.option("--no-verify", is_flag=True, help="Do not run IN and OUT against each other before writing.")
@click.option("--report", "report_path", metavar="F", type=click.Path(path_type=Path), help="Also write a JSON report.")
@click.option("--print-after", metavar="STAGE", help="Print the graph after this stage, on the standard error.")
@_trust
def rewrite(
    source: Path,
    output: Path,
    target: str | None,
    kernel: str | None,
    numerics: Numerics,
    certify: Literal["full", "quick", "off"],
    custom_op: bool,
    no_verify: bool,
    report_path: Path | None,
    print_after: str | None,
    trust_input: bool,
) -> None:
    """Fuse the attention in IN, a .pt2, and write the result to OUT.

    OUT is made of ATen operators alone, so it loads without attnfuse. It is written when all went well
    and not at all otherwise.
    """
    aim = _target_of(target)
    if kernel is not None:
        lookup(kernel)
    _check_places(source, output, report_path)
    with stage(f"reading {source}"):
        program = pt2.load(source, trust_input=trust_input)
    with stage("fusing"):
        result, report = pt2.rewrite(
            program, target=aim, custom_op=custom_op, kernel=kernel, numerics=numerics, certify=certify
        )
    with stage("verifying"):
        reason = _why_unverified(aim, custom_op=custom_op, no_verify=no_verify)
        resample = numerics == "faithful"
        certificate = Certificate(skipped=reason) if reason else pt2.check(program, result, resample=resample)
    document = _document(report, certificate)
    with stage(f"writing {output}"):
        pt2.save(result, output, {"attnfuse.json": document})
    if report_path is not None:
        with replacing(report_path) as stream:
            stream.write(document.encode())
    show_report(report)
    show_certificate(certificate)


@attnfuse.command()
@_source
@_target
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_trust
def explain(source: Path, target: str | None, as_json: bool, trust_input: bool) -> None:
    """Say of each attention in IN, a .pt2, whether it would be fused, and if not, why and where."""
    aim = _target_of(target)
    with stage(f"reading {source}"):
        program = pt2.load(source, trust_input=trust_input)
    with stage("looking for attention"):
        _, report = pt2.rewrite(program, target=aim)
    if as_json:
        click.echo(report.to_json())
    else:
        show_report(report)


@attnfuse.command("kernels")
@click.option(
    "--for", "what", metavar="SPEC", help="A .pt2, a spec's text, or a score such as 'where(n <= m, s, -inf)'."
)
@click.option("--sizes", metavar="B,H,Hkv,M,N,D", default="1,16,16,2048,2048,64", show_default=True,
              help="Sizes to judge a SPEC at that is no .pt2.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@_target
@_trust
def list_kernels(what: str | None, sizes: str, dtype: str, target: str | None, trust_input: bool) -> None:
    """List the kernels; with --for, each one's estimated time for SPEC, or why it cannot compute it."""
    aim = _target_of(target)
    if what is None:
        doc = {name: (type(each).__doc__ or "").strip().partition("\n")[0] for name, each in kernels().items()}
        show_rows(("kernel", "devices", ""), [(n, ", ".join(e.devices), doc[n]) for n, e in kernels().items()])
        return
    if what.endswith(".pt2") or Path(what).is_file():
        problems = problems_in(pt2.load(Path(what), trust_input=trust_input), aim)
    else:
        problems = iter([("", problem_of(what, Sizes.parse(sizes), getattr(torch, dtype)))])
    for site, problem in problems:
        click.echo(f"{site or 'attention'}: {describe(problem.spec)} on {aim}")
        show_rows(("kernel", "estimate", "because"), map(_candidate_row, choose(problem, aim).candidates))


@attnfuse.command()
def demo() -> None:
    """Export a small decoder, fuse its attention, verify it and time both, here and now."""
    demonstration.run()


def _target_of(source: str | None) -> Target:
    return Target.current() if source is None else Target.parse(source)


def _why_unverified(target: Target, *, custom_op: bool, no_verify: bool) -> str:
    if no_verify:
        return "--no-verify was given"
    if custom_op and target.kind != Target.current().kind:
        return f"kernels for {target} cannot run on this machine"
    return ""


def _check_places(source: Path, *outputs: Path | None) -> None:
    """Find out before the work, not after it, that a result has nowhere to go. Raises :class:`BadInput`."""
    taken = {source.resolve(): "the input"}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken:
            raise BadInput(f"{path} is {taken[path.resolve()]}; choose another place for the result")
        if path.is_dir():
            raise BadInput(f"cannot write {path}: it is a directory")
        if not os.access(path.parent, os.W_OK):
            raise BadInput(f"cannot write {path}: {path.parent} is not a directory that can be written to")
        taken[path.resolve()] = "another output"


def _document(report: Report, certificate: Certificate) -> str:
    """The report as JSON, with how the result was verified and by which version it was made."""
    known = {"attnfuse": __version__, **json.loads(report.to_json()), "verification": asdict(certificate)}
    return json.dumps(known, indent=1)


def _candidate_row(candidate: Candidate) -> tuple[str, ...]:
    time = "" if candidate.seconds is None else f"{1e3 * candidate.seconds:.3g} ms"
    return candidate.name, time, "; ".join(candidate.reasons)
