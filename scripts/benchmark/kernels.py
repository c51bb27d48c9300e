"""Each kernel's forward and backward alone on a GPU, beside those of the others: what the cost models must agree with.

Measured are the kernels that do not refuse the problem on the device there is, whichever of them would be chosen.
Bfloat16, as many batches as make up the tokens of :mod:`benchmark.gpu`; query, key and value lie as a projection leaves
them. Calls are replayed from CUDA graphs, medians of rounds in which each has its turn. A backward is that of a forward
of the same kernel; where a kernel leaves it to another, the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from attnfuse.kernels import UNFUSED, Operand, Problem, Residual, choose, lookup
from attnfuse.kernels.kernel import Kernel
from attnfuse.operands import Operands
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec, Captured
from attnfuse.target import Target
from benchmark.ahead import Prepare
from benchmark.clock import Call, interleaved
from benchmark.failures import all_graphed, give_back, noted
from benchmark.gpu import HEADS, TOKENS

__all__ = [
    "PROBLEMS",
    "KernelCase",
    "KernelRow",
    "as_line",
    "as_table",
    "kernel_cases",
    "measure_kernels",
    "to_compile",
]

DTYPE = torch.bfloat16
LENGTHS, WIDTHS = (512, 1024, 2048, 4096), (64, 128, 256)
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Program:
    """A score program in which ``scale`` and ``window`` stand for numbers; axes of what it captures, its key heads.

    ``learned`` says that what it captures has a gradient.
    """

    score: str
    kv_heads: int = HEADS
    captured: tuple[str, ...] = ()
    learned: bool = False


PROBLEMS = {
    "plain": Program("{scale} * s"),
    "causal": Program("where(n <= m, {scale} * s, -inf)", kv_heads=8),
    "window": Program("where((n <= m) & (n >= m - {window}), {scale} * s, -inf)", kv_heads=8),
    "softcap": Program("where(n <= m, 50.0 * tanh({scale} * s / 50.0), -inf)", kv_heads=8),
    "alibi": Program("where(n <= m, {scale} * s + t0 * (n - m), -inf)", captured=("h",)),
    "bias": Program("{scale} * s + t0", captured=("h", "m", "n"), learned=True),
}


@dataclass(frozen=True)
class KernelCase:
    """One of :data:`PROBLEMS` at a number of keys, with heads of a width; a window is a quarter of the keys."""

    name: str
    keys: int
    width: int

    def __str__(self) -> str:
        return f"{self.name} N={self.keys} D={self.width}"

    @property
    def program(self) -> Program:
        """Its score program."""
        return PROBLEMS[self.name]

    @property
    def spec(self) -> AttentionSpec:
        """Its spec, numbers put in."""
        score = self.program.score.format(scale=self.width**-0.5, window=self.keys // 4 - 1)
        captured = (Captured(self.program.captured, "bfloat16"),) if self.program.captured else ()
        return AttentionSpec(parse(score), captures=captured)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of query, key, value and what is captured."""
        batch, heads = max(1, TOKENS // self.keys), (HEADS, self.program.kv_heads, self.program.kv_heads)
        extent = {"h": HEADS, "m": self.keys, "n": self.keys}
        read = [tuple(extent[a] if a in c.axes else 1 for a in ("b0", "h", "m", "n")) for c in self.spec.captures]
        return [*((batch, each, self.keys, self.width) for each in heads), *read]

    def problem(self, *, training: bool) -> Problem:
        """What kernels are asked about."""
        query, key, value = (Operand(shape, DTYPE, training) for shape in self.shapes[:3])
        read = tuple(Operand(shape, DTYPE, training and self.program.learned) for shape in self.shapes[3:])
        return Problem(self.spec, query, key, value, read, rows_kept=True)

    def kernels(self, target: Target, *, training: bool) -> list[str]:
        """Those that do not refuse it there."""
        return [name for name in choose(self.problem(training=training), target).seconds if name != UNFUSED]

    def operands(self) -> Operands:
        """Random tensors on the GPU."""
        torch.manual_seed(0)
        query, key, value, *captured = self.shapes
        read = tuple(torch.rand(shape, device="cuda").to(DTYPE) for shape in captured)
        return Operands(_projected(query), _projected(key), _projected(value), read)


@dataclass(frozen=True)
class KernelRow:
    """Milliseconds of each kernel's ``forward`` and ``backward``, and why others have none."""

    case: KernelCase
    milliseconds: dict[str, dict[str, float]]
    absent: dict[str, str] = field(default_factory=dict)


def kernel_cases(names: tuple[str, ...], lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[KernelCase]:
    """The rows that are asked for; where a tuple is empty, the usual ones."""
    return [
        KernelCase(name, keys, width)
        for name in names or tuple(PROBLEMS)
        for width in widths or WIDTHS
        for keys in lengths or LENGTHS
    ]


def to_compile(cases: Sequence[KernelCase]) -> dict[str, Prepare]:
    """What :func:`benchmark.ahead.compile_ahead` is to compile of them."""
    here = Target.current()
    return {
        f"{case} {name}": partial(_prepared, case, name)
        for case in cases
        for name in case.kernels(here, training=False)
    }


def measure_kernels(cases: Sequence[KernelCase]) -> Iterator[KernelRow]:
    """The rows, each as it comes."""
    for case in cases:
        yield _measured(case)
        give_back()


def _measured(case: KernelCase) -> KernelRow:
    absent: dict[str, str] = {}
    calls: dict[str, Call] = {}
    operands = case.operands()
    for name in case.kernels(Target.current(), training=False):
        with noted(absent, name):
            calls |= {f"{name} {step}": call for step, call in _steps(case, name, operands).items()}
    # the calls hold what their graphs read: they must live as long
    found = interleaved(all_graphed(calls, absent))
    return KernelRow(case, _by_kernel(found), absent)


def _by_kernel(milliseconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """``kernel step`` by kernel and step."""
    found: dict[str, dict[str, float]] = {}
    for key, ms in milliseconds.items():
        name, _, step = key.rpartition(" ")
        found.setdefault(name, {})[step] = ms
    return found


def _prepared(case: KernelCase, name: str) -> Callable[[], object]:
    steps = _steps(case, name, case.operands())
    return lambda: [call() for call in steps.values()]


def _steps(case: KernelCase, name: str, operands: Operands) -> dict[str, Call]:
    """The kernel's forward and, if it does not refuse to train, its backward."""
    kernel, spec = lookup(name), case.spec
    steps: dict[str, Call] = {FORWARD: partial(kernel.run, spec, operands)}
    if name in case.kernels(Target.current(), training=True):
        residual, grad = _residual(kernel, spec, operands), _projected(case.shapes[0])
        needs = [True] * 3 + [case.program.learned] * len(operands.captures)
        steps[BACKWARD] = partial(kernel.backward, spec, grad, operands, needs, residual)
    return steps


def _residual(kernel: Kernel, spec: AttentionSpec, operands: Operands) -> Residual:
    if kernel.saves_lse:
        return Residual(*kernel.run_with_lse(spec, operands))
    return Residual(kernel.run(spec, operands))


def _projected(shape: Sequence[int]) -> Tensor:
    batch, heads, rows, width = shape
    return torch.randn(batch, rows, heads, width, device="cuda", dtype=DTYPE).transpose(1, 2)


def as_table(rows: Sequence[KernelRow]) -> Table:
    """One line a problem, one column a kernel: forward and backward."""
    table = Table(title=f"milliseconds, forward and backward; {torch.cuda.get_device_name()}, bf16")
    kernels = list(dict.fromkeys(name for row in rows for name in row.milliseconds))
    for heading in ("problem", "N", "D", *kernels):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        case = (row.case.name, str(row.case.keys), str(row.case.width))
        table.add_row(*case, *(_cell(row, name) for name in kernels))
    return table


def as_line(row: KernelRow) -> str:
    """One row, as soon as it is known."""
    figures = (f"{name} {_cell(row, name)}" for name in row.milliseconds)
    return f"{row.case}: {'; '.join(figures)} (milliseconds, forward and backward)"


def _cell(row: KernelRow, name: str) -> str:
    found = row.milliseconds.get(name, {})
    return " ".join(f"{found[step]:.3f}" if step in found else "-" for step in (FORWARD, BACKWARD))
