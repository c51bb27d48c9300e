"""Measures the same variants on a GPU, at the size of a model in use: every peer of one variant side by side.

Bfloat16, batch 2, 32 heads; forward alone, and forward with backward. Times are medians of device events, peers
in turn within a round, so that a device that slows down slows all. Errors are the forward's against float64.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor

import attnfuse
from benchmark.byhand import Tensors
from benchmark.cases import VARIANTS, Case, Variant
from benchmark.peers import OURS, PEERS
from benchmark.targets import Target

__all__ = ["GpuCase", "GpuRow", "as_table", "gpu_cases", "measure_gpu", "targets"]

BATCH, HEADS, WIDTH, LENGTH = 2, 32, 128, 4096
#: Decoding's numbers of keys, one query row each.
DECODED = (4096, 32768)
ROUNDS, SECONDS = 15, 0.02


@dataclass(frozen=True)
class GpuCase(Case):
    """A variant at a length, of ``BATCH`` x ``HEADS`` heads of ``WIDTH``; ``training`` measures the backward too."""

    training: bool = False

    def __str__(self) -> str:
        return f"{super().__str__()}{' training' if self.training else ''}"

    def inputs(self) -> Tensors:
        """Random tensors on the GPU by the names of the program's parameters, asking for gradients in training."""
        torch.manual_seed(0)
        variant = self.variant
        kv_heads = HEADS * variant.kv_heads // variant.heads
        rows = variant.rows or self.length
        shapes = {
            "query": (BATCH, HEADS, rows, WIDTH),
            "key": (BATCH, kv_heads, self.length, WIDTH),
            "value": (BATCH, kv_heads, self.length, WIDTH),
            **{name: (HEADS, *(self.length for _ in axes)) for name, axes in variant.extra.items()},
        }
        made = {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}
        if "slopes" in made:
            made["slopes"] = 2.0 ** -(torch.arange(1.0, HEADS + 1, device="cuda") / 4)
        return {name: x.to(torch.bfloat16).requires_grad_(self.training) for name, x in made.items()}


@dataclass(frozen=True)
class GpuRow:
    """Milliseconds of each peer, why others have none, our largest error and the source's, and our kernel."""

    case: GpuCase
    milliseconds: dict[str, float]
    kernel: str
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def gpu_cases(names: tuple[str, ...], lengths: tuple[int, ...]) -> list[GpuCase]:
    """The rows that are asked for; an empty tuple asks for all there are."""
    chosen = [variant for variant in VARIANTS if not names or variant.name in names]
    return [
        GpuCase(variant.name, length, "bf16", training)
        for variant in chosen
        for length in lengths or (DECODED if variant.rows else (LENGTH,))
        for training in ((False,) if variant.rows else (False, True))
    ]


def measure_gpu(case: GpuCase) -> GpuRow:
    """The row of ``case``."""
    given = case.inputs()
    calls: dict[str, Callable[[], object]] = {}
    outs, absent = {}, {}
    for name, prepare in PEERS.items():
        try:
            torch.compiler.reset()
            call = prepare(case, given)
            if call is None:
                absent[name] = "cannot express it"
                continue
            with torch.set_grad_enabled(case.training):
                outs[name] = call().detach()
            calls[name] = _step(call, given) if case.training else torch.no_grad()(call)
            calls[name]()
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, and is printed as one
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    errors = {} if case.training else _errors(case, given, outs)
    return GpuRow(case, _interleaved(calls), _kernel(case.variant, given), errors, absent)


def _step(call: Callable[[], Tensor], given: Tensors) -> Callable[[], object]:
    grad = torch.randn_like(call().detach())
    return lambda: torch.autograd.grad(call(), list(given.values()), grad)


def _interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    repeats = {name: max(1, math.ceil(SECONDS / _seconds(call, 3))) for name, call in calls.items()}
    rounds = [{name: _seconds(call, repeats[name]) for name, call in calls.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) * 1e3 for name in calls}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def _errors(case: GpuCase, given: Tensors, outs: dict[str, Tensor]) -> dict[str, float]:
    wide = {name: tensor.detach().double() for name, tensor in given.items()}
    share = HEADS * case.variant.kv_heads // case.variant.heads
    axis = {name: 1 if name in ("query", "key", "value") else 0 for name in wide}
    parts = ({name: tensor.chunk(share, axis[name])[part] for name, tensor in wide.items()} for part in range(share))
    exact = torch.cat([case.variant.program(**part) for part in parts], dim=1)
    return {name: (out.double() - exact).abs().max().item() for name, out in outs.items()}


def _kernel(variant: Variant, given: Tensors) -> str:
    report = attnfuse.explain(variant.program, **given)
    return ", ".join([site.kernel for site in report.fused] + ["unfused"] * len(report.refused)) or "no site"


def as_table(rows: list[GpuRow]) -> Table:
    """One line a row, one column a peer; the last but one is our time over the best peer's."""
    table = Table(
        title=f"milliseconds on {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, batch {BATCH}"
    )
    for heading in ("variant", "N", "step", *PEERS, "/ best", "kernel", "error", "source's"):
        table.add_column(heading, no_wrap=True, style="bold" if heading == OURS else None)
    for row in rows:
        times = [f"{row.milliseconds[peer]:.3f}" if peer in row.milliseconds else "-" for peer in PEERS]
        errors = [f"{row.errors[peer]:.1e}" if peer in row.errors else "-" for peer in (OURS, "eager")]
        step = "fwd+bwd" if row.case.training else "fwd"
        table.add_row(row.case.name, str(row.case.length), step, *times, f"{_ratio(row):.2f}", row.kernel, *errors)
    return table


def _ratio(row: GpuRow) -> float:
    """Our time over the fastest peer's."""
    others = [ms for name, ms in row.milliseconds.items() if name != OURS]
    return row.milliseconds[OURS] / min(others) if others and OURS in row.milliseconds else math.nan


def targets(rows: list[GpuRow]) -> list[Target]:
    """What the rows must show: no peer faster, Inductor left behind wherever there is a mask, sinks nearly free."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(_ratio(row)) else _ratio(row))
    found = [Target("time / best peer, worst row", _ratio(worst), 1.0, where=str(worst.case))]
    forward = {row.case.name: row.milliseconds for row in rows if not (row.case.training or row.case.variant.rows)}
    for name, ms in forward.items():
        if name != "plain" and {OURS, "inductor"} <= set(ms):
            found.append(Target("speed-up over Inductor", ms["inductor"] / ms[OURS], 4.0, at_least=True, where=name))
    if OURS in forward.get("sinks", {}) and OURS in forward.get("llama", {}):
        found.append(Target("sinks / causal", forward["sinks"][OURS] / forward["llama"][OURS], 1.15))
    return found
