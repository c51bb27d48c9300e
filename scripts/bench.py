"""Measures attnfuse beside its peers on this machine: speed, memory and error, or with --cost the rewriting itself.

\b
python scripts/bench.py --device cpu             every variant, length and dtype
python scripts/bench.py --only llama,bias -n 2048
python scripts/bench.py --quick                  seconds, not minutes: does it run at all
python scripts/bench.py --device cuda            every variant on a GPU, forward and backward, N = 4096, D = 128
python scripts/bench.py --device cuda -n 512,16384 --widths 64,256 --steps forward --only llama --json f --plot f
python scripts/bench.py --device cuda -n 512 --peers "SDPA by hand,attnfuse"
                                                 rows are prepared side by side, on every GPU; timed in turn on each
python scripts/bench.py --device cuda --models    whole models there, beside the same rewritten by hand
python scripts/bench.py --device cuda --kernels --only causal,window --json f
                                                 each kernel's forward and backward alone, for the cost models
python scripts/bench.py --cost                   fuse_graph against nodes, and against Inductor
python scripts/bench.py --layouts --device cuda  what layouts cost there; kept for the cost model
python scripts/bench.py --blocks --device cuda   attention blocks by where their transposes are
python scripts/bench.py --hopper --json out.json the Gluon kernel against cuDNN and FlexAttention, on a Hopper GPU
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmark import blocks as whole_blocks
from benchmark import cost as rewriting
from benchmark import gpu_plot, gpu_table, hopper_table, models
from benchmark import hopper as forwards
from benchmark import hopper_backward as backwards
from benchmark import hopper_float8 as float8
from benchmark import kernels as alone
from benchmark.ahead import Prepare, compile_ahead
from benchmark.cases import DTYPES, QUICK_LENGTH, VARIANTS, Case, cases
from benchmark.gpu import GpuRow, gpu_cases
from benchmark.gpu_rows import Machine, measure_rows
from benchmark.kernels import KernelRow
from benchmark.layouts import LAYOUT_DEVICES, as_rows, measure_layouts, write
from benchmark.measure import Effort, Row, measure
from benchmark.models import ModelRow
from benchmark.peers import PEERS
from benchmark.table import as_json, as_line, as_table
from benchmark.targets import Target, growth, speed

T = TypeVar("T")

QUICK = Effort(seconds=0.5, fewest=2, most=3, block=0.002)
LAYERS = (8, 16, 32, 64, 128)
QUICK_LAYERS = (1, 2, 4)
STEPS = ("forward", "training")

#: Wide enough for every column where the output is no terminal.
err, out = Console(stderr=True), Console(width=None if Console().is_terminal else 190)

Names = Annotated[str, typer.Option(help=f"of {', '.join(variant.name for variant in VARIANTS)}; all when left out")]
Lengths = Annotated[str, typer.Option("--lengths", "-n", help="numbers of keys; each variant's own when left out")]
Widths = Annotated[str, typer.Option(help="head sizes on a GPU; 128 when left out")]
Steps = Annotated[str, typer.Option(help=f"of {', '.join(STEPS)}, on a GPU; both when left out")]
Peers = Annotated[str, typer.Option(help=f"of {', '.join(PEERS)}, on a GPU; all when left out")]
Dtypes = Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}; both when left out")]


def bench(
    device: Annotated[str, typer.Option(help="where to measure: cpu or cuda")] = "cpu",
    only: Names = "",
    lengths: Lengths = "",
    dtypes: Dtypes = "",
    widths: Widths = "",
    steps: Steps = "",
    peers: Peers = "",
    cost: Annotated[bool, typer.Option("--cost", help="measure the rewriting instead")] = False,
    layouts: Annotated[bool, typer.Option("--layouts", help="measure what layouts cost, for the cost model")] = False,
    whole: Annotated[bool, typer.Option("--models", help="measure whole models on a GPU")] = False,
    each: Annotated[bool, typer.Option("--kernels", help="measure each kernel's steps alone on a GPU")] = False,
    hopper: Annotated[bool, typer.Option("--hopper", help="measure the Gluon kernel on a Hopper GPU instead")] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="measure attention blocks by layout rule instead")] = False,
    plot: Annotated[Path | None, typer.Option(help="draw a GPU's ratios to this PNG; needs matplotlib")] = None,
    inductor_layers: Annotated[int, typer.Option(help="the deepest Llama that --cost has Inductor compile")] = 32,
    quick: Annotated[bool, typer.Option("--quick", help="tiny and rough: a smoke test")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 when a target is missed")] = False,
    json: Annotated[Path | None, typer.Option(help="write every figure to this file too")] = None,
) -> None:
    if layouts:
        _bench_layouts(device, json, quick=quick)
        return
    if hopper:
        _bench_hopper(only, json, plot)
        return
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} cannot be measured; cpu and cuda can", param_hint="--device")
    if blocks:
        content, targets = _bench_blocks(device, _words(only))
    elif each:
        content, targets = _bench_kernels(device, only, lengths, widths, json)
    elif device == "cuda":
        content, targets = (
            _bench_models(only, steps, json) if whole else _bench_gpu(only, lengths, widths, steps, peers, plot, json)
        )
    elif cost:
        content, targets = _bench_cost(QUICK_LAYERS if quick else LAYERS, inductor_layers)
    else:
        sizes = tuple(map(_length, _words(lengths))) or ((QUICK_LENGTH,) if quick else ())
        names = _known("variant", only, [variant.name for variant in VARIANTS])
        todo = cases(names, sizes, _known("dtype", dtypes, DTYPES))
        content, targets = _bench_rows(todo, QUICK if quick else Effort(), json)
    for target in targets:
        out.print(str(target), highlight=False)
    if json is not None:
        json.write_text(as_json(content, targets))
    if check and not all(target.met for target in targets):
        raise typer.Exit(1)


def _bench_layouts(device: str, path: Path | None, *, quick: bool) -> None:
    if device not in LAYOUT_DEVICES:
        raise typer.BadParameter(f"{device!r} is none of {', '.join(LAYOUT_DEVICES)}", param_hint="--device")
    table = measure_layouts(device, quick=quick)
    out.print(as_rows(table))
    out.print(f"written to {write(table, path)}", highlight=False)


def _bench_hopper(only: str, json: Path | None, plot: Path | None) -> None:
    tasks = forwards.to_compile(only), float8.float8_to_compile(only), backwards.backward_to_compile(only)
    _compile_ahead({name: prepare for each in tasks for name, prepare in each.items()})
    rows: list[forwards.Row] = []
    for row in chain(forwards.hopper(only), float8.float8_rows(only), backwards.backward_rows(only)):
        rows.append(row)
        err.print(hopper_table.as_text(rows[-1:]).splitlines()[-1], highlight=False)
        if json is not None:
            hopper_table.save(rows, json)
    out.print(hopper_table.as_text(rows), highlight=False)
    if plot is not None:
        hopper_table.plot(rows, plot)


def _words(listed: str) -> tuple[str, ...]:
    return tuple(filter(None, listed.split(",")))


def _known(what: str, listed: str, names: Collection[str]) -> tuple[str, ...]:
    for word in _words(listed):
        if word not in names:
            raise typer.BadParameter(f"no {what} is called {word!r}; there are {', '.join(names)}")
    return _words(listed)


def _length(word: str) -> int:
    if not word.isdigit() or int(word) == 0:
        raise typer.BadParameter(f"{word!r} is no length")
    return int(word)


def _bench_rows(
    todo: Sequence[Case], effort: Effort, json: Path | None
) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    rows = _collected((_in_fresh_process(measure, case, effort) for case in todo), len(todo), as_line, json)
    out.print(as_table(rows))
    _print_absent(rows)
    return {"rows": rows}, [*speed(rows), *growth(rows)]


def _bench_gpu(
    only: str, lengths: str, widths: str, steps: str, peers: str, plot: Path | None, json: Path | None
) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    names = _known("variant", only, [variant.name for variant in VARIANTS])
    lengths_of, widths_of = (tuple(map(_length, _words(listed))) for listed in (lengths, widths))
    todo = gpu_cases(names, lengths_of, widths_of, _known("step", steps, STEPS))
    competing = _known("peer", peers, PEERS) or tuple(PEERS)
    _need_gpu()
    rows: list[GpuRow] = []
    for row in track(measure_rows(todo, competing, Machine.here()), "measuring", len(todo), console=err):
        rows = sorted([*rows, row], key=lambda row: todo.index(row.case))
        err.print(gpu_table.as_line(row), highlight=False)
        _keep(json, {"rows": rows})
    out.print(gpu_table.as_table(rows))
    _print_absent(rows)
    out.print(gpu_table.summary(rows), highlight=False)
    if plot is not None:
        gpu_plot.plot(rows, plot)
    return {"rows": rows}, gpu_table.targets(rows)


def _bench_models(only: str, steps: str, json: Path | None) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    _need_gpu()
    todo = models.model_cases(_known("model", only, models.MODELS), _known("step", steps, STEPS))
    rows = _collected(models.measure_models(todo), len(todo), models.as_line, json, "models")
    out.print(models.as_table(rows))
    _print_absent(rows)
    return {"models": rows}, models.targets(rows)


def _bench_kernels(
    device: str, only: str, lengths: str, widths: str, json: Path | None
) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    names = _known("problem", only, alone.PROBLEMS)
    todo = alone.kernel_cases(names, *(tuple(map(_length, _words(listed))) for listed in (lengths, widths)))
    if device != "cuda":
        raise typer.BadParameter("kernels are measured alone on a GPU, with cuda", param_hint="--device")
    _need_gpu()
    _compile_ahead(alone.to_compile(todo))
    rows = _collected(alone.measure_kernels(todo), len(todo), alone.as_line, json)
    out.print(alone.as_table(rows))
    _print_absent(rows)
    return {"rows": rows}, []


def _collected(
    found: Iterable[T], count: int, as_line: Callable[[T], str], json: Path | None, key: str = "rows"
) -> list[T]:
    """Rows as they come, each printed and kept at once."""
    rows: list[T] = []
    for row in track(found, "measuring", count, console=err):
        rows.append(row)
        err.print(as_line(row), highlight=False)
        _keep(json, {key: rows})
    return rows


def _keep(json: Path | None, content: dict[str, Sequence[Any]]) -> None:
    """What is interrupted keeps the rows that it has."""
    if json is not None:
        draft = json.with_name(f".{json.name}.part")
        draft.write_text(as_json(content, []))
        draft.replace(json)


def _compile_ahead(tasks: dict[str, Prepare]) -> None:
    _need_gpu()
    for failure in compile_ahead(tasks):
        err.print(f"compiling ahead failed: {failure}", highlight=False)


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU that torch can use", param_hint="--device")


def _print_absent(rows: Sequence[Row | GpuRow | ModelRow | KernelRow]) -> None:
    for row in rows:
        for peer, reason in row.absent.items():
            err.print(f"{row.case}: no figure for {peer}: {reason}", highlight=False)


def _bench_blocks(device: str, names: tuple[str, ...]) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    if device != "cuda" or not torch.cuda.is_available():
        raise typer.BadParameter("blocks are measured on a GPU that torch can use", param_hint="--device")
    rows = list(track(whole_blocks.measure_blocks(names), "measuring", console=err))
    out.print(whole_blocks.as_table(rows))
    return {"rows": rows}, whole_blocks.targets(rows)


def _bench_cost(layers: Sequence[int], inductor_layers: int) -> tuple[dict[str, Sequence[Any]], list[Target]]:
    todo = track(layers, "rewriting", console=err)
    costs = [_in_fresh_process(rewriting.measure_cost, depth, with_inductor=depth <= inductor_layers) for depth in todo]
    out.print(rewriting.as_table(costs))
    return {"costs": costs}, rewriting.targets(costs)


def _in_fresh_process(call: Callable[..., T], *args: object, **options: object) -> T:
    """What ran before would still be in its caches, its memory and its compiler's counters."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, *args, **options).result()


# the module's own words are the command's help
bench.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(bench)
