"""Measures whole attention blocks on a GPU with transposes where the solver puts them, and where fixed rules do.

Each block is compiled by Inductor around one Triton kernel, four times: with the layouts that the minimum cut chooses,
and with those of (a) never to propagate, (b) always to copy, (c) always to propagate. Rules that come to the same graph
are measured once. Times are medians of rounds in which every rule has its turn. Reached by
``python scripts/bench.py --blocks --device cuda``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from attnfuse import fuse_graph
from attnfuse.graph.text import render
from attnfuse.kernels import Problem
from attnfuse.passes.lower import Prices
from attnfuse.passes.place import IMPOSSIBLE, Decision, Labels, Region, fixed_rules
from benchmark.block_programs import BLOCKS, Block, Kit, Sizes
from benchmark.targets import Target

__all__ = ["RULES", "BlockRow", "as_table", "measure_blocks", "targets"]

KERNEL = "triton"
#: In the order they are measured; the first is no rule.
RULES = ("solver", "never propagate", "always copy", "always propagate")
ROUNDS, CALLS = 10, 2
#: How much slower than the best rule the solver's layouts may be measured.
NOISE = 1.02


@dataclass(frozen=True)
class BlockRow:
    """Milliseconds of a block by rule, which rules come to one graph, how value lies in each (a letter an attention),
    and by what part of its norm the results of the graphs differ.
    """

    block: str
    dtype: str
    milliseconds: dict[str, float]
    graphs: dict[str, int]
    layouts: dict[str, str]
    apart: float


class Forced(Decision):
    """Layouts that are kept whatever they cost."""

    @property
    def spent(self) -> float:
        return -math.inf


@contextmanager
def placed_by(rule: str) -> Iterator[None]:
    """Lets a fixed rule decide, which takes value to be wanted transposed whatever a kernel says, or the solver."""
    if rule == "solver":
        yield
        return

    def decide(region: Region) -> Decision:
        return Forced(region, _labels(rule, region))

    def prices(self: Prices, problem: Problem, names: Sequence[str]) -> tuple[float, float]:
        return (2.0, 1.0) if "value" in names else (1.0, 1.0)

    with patch("attnfuse.layouts.decide", decide), patch.object(Prices, "of", prices):
        yield


def _labels(rule: str, region: Region) -> Labels:
    today = region.problem.today
    match rule:
        case "always copy":
            return fixed_rules(region)["copy"]
        case "always propagate":
            able = (value.price.n < IMPOSSIBLE for value in region.problem.values)
            return tuple("n" if can else was for can, was in zip(able, today, strict=True))
    return today


@dataclass
class Compiled:
    """The graphs that a block's rules come to, each compiled once."""

    known: dict[str, Callable[..., Any]] = field(default_factory=dict)
    text: str = ""
    layout: str = ""

    def backend(self, rule: str, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with placed_by(rule):
            fused = fuse_graph(gm, inputs, kernel=KERNEL, certify="off", profit=False)
        report = fused.meta["attnfuse_report"]
        if report.refused or not report.fused:
            raise RuntimeError(str(report))
        self.text, self.layout = render(fused), ", ".join(site.layouts["value"] for site in report.fused)
        if self.text not in self.known:
            self.known[self.text] = lookup_backend("inductor")(fused, list(inputs))
        return self.known[self.text]


def measure_block(block: Block, sizes: Sizes, *, narrow: bool) -> BlockRow:
    """The row of one block."""
    torch.compiler.reset()
    program = partial(block.program, Kit(sizes, narrow))
    x, weights = block.inputs(sizes, narrow=narrow)
    compiled = Compiled()
    graph_of: dict[str, int] = {}
    layout_of: dict[str, str] = {}
    calls: dict[int, Callable[[], object]] = {}
    outs: dict[int, Tensor] = {}
    for name in RULES:
        call = torch.compile(program, backend=partial(compiled.backend, name), fullgraph=True, dynamic=False)
        with torch.inference_mode():
            found = call(x, weights)
        graph_of[name], layout_of[name] = list(compiled.known).index(compiled.text), compiled.layout
        calls.setdefault(graph_of[name], partial(call, x, weights))
        outs[graph_of[name]] = (found[0] if isinstance(found, tuple) else found)[:1].clone()
    seconds = interleaved(calls)
    times = {name: seconds[graph] * 1e3 for name, graph in graph_of.items()}
    apart = max(((out - outs[0]).norm() / outs[0].norm()).item() for out in outs.values())
    return BlockRow(block.name, "float8" if narrow else "bfloat16", times, graph_of, layout_of, apart)


def interleaved(calls: dict[int, Callable[[], object]]) -> dict[int, float]:
    """Seconds of each call; every other round runs backwards, since what follows a hot call runs slower."""
    turns = (list(calls.items())[:: 1 if turn % 2 else -1] for turn in range(ROUNDS))
    rounds = [{graph: _seconds(call) for graph, call in turn} for turn in turns]
    return {graph: statistics.median(each[graph] for each in rounds) for graph in calls}


@torch.inference_mode()
def _seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / CALLS


def measure_blocks(names: Sequence[str]) -> Iterator[BlockRow]:
    """Every block, or those named, in float8 and in bfloat16."""
    for narrow in (True, False):
        for block in BLOCKS:
            if not names or block.name in names:
                yield measure_block(block, Sizes(), narrow=narrow)


def as_table(rows: Sequence[BlockRow]) -> Table:
    """One line a row; rules that come to the solver's graph are marked with a sign of equality."""
    where = torch.cuda.get_device_name()
    table = Table(title=f"milliseconds of attention blocks on {where}, torch {torch.__version__}, {Sizes()}")
    for heading in ("block", "dtype", *RULES, "value", "/ best rule"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        first = row.graphs["solver"]
        cells = [
            f"{ms:.2f}{' =' if name != 'solver' and row.graphs[name] == first else ''}"
            for name, ms in row.milliseconds.items()
        ]
        table.add_row(row.block, row.dtype, *cells, row.layouts["solver"], f"{_ratio(row):.3f}")
    return table


def _ratio(row: BlockRow) -> float:
    """The solver's time over that of the best rule."""
    return row.milliseconds["solver"] / min(ms for name, ms in row.milliseconds.items() if name != "solver")


def targets(rows: Sequence[BlockRow]) -> list[Target]:
    """The solver's layouts are the fastest or equal, and each fixed rule is wrong somewhere."""
    worst = max(rows, key=_ratio)
    found = [Target("solver / best rule, worst block", _ratio(worst), NOISE, where=f"{worst.block}, {worst.dtype}")]
    for rule in RULES[1:]:
        row = max(rows, key=lambda each, rule=rule: each.milliseconds[rule] / each.milliseconds["solver"])  # type: ignore[misc]
        ratio = row.milliseconds[rule] / row.milliseconds["solver"]
        where = f"{row.block}, {row.dtype}"
        found.append(Target(f"{rule} / solver, where it is most wrong", ratio, NOISE, at_least=True, where=where))
    return found
