"""Measures the same variants on a GPU, at the size of a model in use: every peer of one variant side by side.

Bfloat16, 32 heads, 8192 tokens of all batches together; forward alone, and forward with backward. Times are medians of
device events, peers in turn within a round, so that a device that slows down slows all. Where any peer's call takes
less than :data:`BRIEF`, which is no longer than Python and torch.compile may take to issue one, all calls of the row
are replayed from CUDA graphs, ours and the peers' alike: what is compared is the device's work.

Errors are against float64 of one key head of the first batch, ``norm(found - true) / norm(true)``: of the output, in
training of the worst of the gradients of query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.fx import GraphModule

from attnfuse import fuse_graph
from attnfuse.report import Report
from benchmark.byhand import Tensors
from benchmark.cases import VARIANTS, Case, Variant
from benchmark.clock import Call, interleaved, seconds
from benchmark.failures import all_graphed, give_back, noted
from benchmark.peers import OURS, PEERS

__all__ = ["HEADS", "TOKENS", "GpuCase", "GpuRow", "Prepared", "gpu_cases"]

HEADS, WIDTH, LENGTH, TOKENS = 32, 128, 4096, 8192
#: Decoding's numbers of keys, one query row each, and its batch.
DECODED, DECODED_BATCH = (4096, 32768), 16
#: Seconds of a call that is replayed from a CUDA graph: what Python takes to issue a step while its host compiles.
BRIEF = 5e-3

_PROGRAMS = ("eager", "inductor", OURS)


@dataclass(frozen=True)
class GpuCase(Case):
    """A variant at a length, of heads of ``width``; ``training`` measures the backward too."""

    training: bool = False
    width: int = WIDTH

    def __str__(self) -> str:
        return f"{self.name} N={self.length} D={self.width}{' training' if self.training else ''}"

    @property
    def variant(self) -> Variant:
        """The variant, its heads merged as an output projection reads them."""
        found = super().variant
        return replace(found, program=_merged(found.program))

    @property
    def batch(self) -> int:
        """As many as make up the tokens."""
        return DECODED_BATCH if self.variant.rows else max(1, TOKENS // self.length)

    @property
    def kv_heads(self) -> int:
        """Of the model's size, in the variant's proportion."""
        return HEADS * self.variant.kv_heads // self.variant.heads

    @property
    def read_bytes(self) -> int:
        """Of key and value, which decoding has to read."""
        return 2 * self.batch * self.kv_heads * self.length * self.width * 2

    def inputs(self) -> Tensors:
        """Random tensors on the GPU by the names of the program's parameters.

        Query, key and value lie as a projection leaves them. In training all but ALiBi's slopes, which are fixed, ask
        for gradients.
        """
        torch.manual_seed(0)
        variant = self.variant
        rows = variant.rows or self.length
        shapes = {
            "query": (self.batch, rows, HEADS, self.width),
            "key": (self.batch, self.length, self.kv_heads, self.width),
            "value": (self.batch, self.length, self.kv_heads, self.width),
            **{name: (HEADS, *(self.length for _ in axes)) for name, axes in variant.extra.items()},
        }
        made = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name, shape in shapes.items()}
        made |= {name: made[name].transpose(1, 2) for name in ("query", "key", "value")}
        if "slopes" in made:
            made["slopes"] = 2.0 ** -(torch.arange(1.0, HEADS + 1, device="cuda") / 4).to(torch.bfloat16)
        if variant.float8:
            # of normal numbers a scale of 1/64 keeps the largest below e4m3's 448
            return {name: (x * 64).to(torch.float8_e4m3fn) if x.dim() == 4 else torch.full_like(x, 1 / 64)
                    for name, x in made.items()}  # fmt: skip
        return {name: x.requires_grad_(self.training and name != "slopes") for name, x in made.items()}


@dataclass(frozen=True)
class GpuRow:
    """Milliseconds and errors of each peer, why others have none, and our kernel."""

    case: GpuCase
    milliseconds: dict[str, float]
    kernel: str
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def gpu_cases(
    names: tuple[str, ...], lengths: tuple[int, ...], widths: tuple[int, ...] = (), steps: tuple[str, ...] = ()
) -> list[GpuCase]:
    """The rows that are asked for; where a tuple is empty, a model's usual ones."""
    chosen = [variant for variant in VARIANTS if not names or variant.name in names]
    return [
        GpuCase(variant.name, length, "bf16", training, width)
        for variant in chosen
        for width in widths or (WIDTH,)
        for length in lengths or (DECODED if variant.rows else (LENGTH,))
        for training, step in ((False, "forward"), (True, "training"))
        if (not steps or step in steps) and not (training and (variant.rows or variant.float8))
    ]


class Prepared:
    """A row whose peers are compiled and called one after another, then timed together, all in one process.

    Memory that it does not hold is given back, since other rows are prepared on the same GPU. Only one of them runs its
    program in float64 at a time: who has ``lock``, a file.
    """

    def __init__(self, case: GpuCase, lock: str) -> None:
        self._case, self._given = case, case.inputs()
        self._kernel = _kernel(case.variant, self._given)
        with FileLock(lock):
            self._truth = _truth(case, self._given)
            give_back()
        self._calls: dict[str, Call] = {}
        self._errors: dict[str, float] = {}

    def add(self, peer: str) -> str:
        """Compiles and calls a peer; why it has no figure, if it has none.

        Raises what the GPU says to a process that can use it no more: one that read outside of memory.
        """
        absent: dict[str, str] = {}
        with noted(absent, peer):
            if not self._called(peer):
                absent[peer] = "cannot express it"
        give_back()
        return absent.get(peer, "")

    def _called(self, peer: str) -> bool:
        step = _step(peer, self._case, self._given)
        if step is None:
            return False
        error = _error(self._case, step(), self._truth)
        step()
        torch.cuda.synchronize()
        self._calls[peer], self._errors[peer] = step, error
        return True

    def row(self) -> GpuRow:
        """The row of the peers that were added, timed."""
        calls, absent = self._calls, dict[str, str]()
        if calls and min(seconds(call, 3) for call in calls.values()) < BRIEF:
            calls = all_graphed(calls, absent)
        return GpuRow(self._case, interleaved(calls), self._kernel, self._errors, absent)


def _step(peer: str, case: GpuCase, given: Tensors) -> Callable[[], tuple[Tensor, ...]] | None:
    """What is timed of a peer: its output, in training its gradients; None where it cannot express the case."""
    call = PEERS[peer](case, given)
    if call is None:
        return None
    if peer not in _PROGRAMS:
        call = _merged(call)
    if not case.training:
        return torch.no_grad()(lambda: (call(),))
    grad = _gradient(case)
    leaves = [x for x in given.values() if x.requires_grad]
    return lambda: torch.autograd.grad(call(), leaves, grad)


def _merged(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Its result as ``[B, M, H * D]``, as models hand it on."""
    return lambda *args, **kwargs: attend(*args, **kwargs).transpose(1, 2).contiguous().flatten(2)


def _gradient(case: GpuCase) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (case.batch, case.variant.rows or case.length, HEADS * case.width)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


# --- errors -----------------------------------------------------------------------------------------


def _first(case: GpuCase, name: str, tensor: Tensor) -> Tensor:
    """The part of an operand that the first key head of the first batch reads."""
    group = HEADS // case.kv_heads
    match name:
        case "key" | "value":
            return tensor[:1, :1]
        case "query":
            return tensor[:1, :group]
        case "out":
            return tensor[:1, :, : group * case.width]
    return tensor[:group]


def _truth(case: GpuCase, given: Tensors) -> tuple[Tensor, ...]:
    """In float64: the output, in training the gradients of query, key and value; a head at a time, to save memory."""
    wide = {name: _first(case, name, x).detach().double() for name, x in given.items()}
    found = [_exact(case, head, wide) for head in range(HEADS // case.kv_heads)]
    if not case.training:
        return (torch.cat([out for (out,) in found], dim=-1),)
    query, key, value = zip(*found, strict=True)
    return torch.cat(query, dim=1), sum(key[1:], key[0]), sum(value[1:], value[0])


def _exact(case: GpuCase, head: int, wide: Tensors) -> tuple[Tensor, ...]:
    mine = {name: _of_head(name, x, head) for name, x in wide.items()}
    if not case.training:
        return (case.variant.program(**mine),)
    leaves = [mine[name].requires_grad_() for name in ("query", "key", "value")]
    grad = _gradient(case)[:1, :, head * case.width : (head + 1) * case.width].double()
    return torch.autograd.grad(case.variant.program(**mine), leaves, grad)


def _of_head(name: str, x: Tensor, head: int) -> Tensor:
    match name:
        case "key" | "value":
            return x
        case "query":
            return x[:, head : head + 1]
    return x[head : head + 1]


def _error(case: GpuCase, found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    names = ("query", "key", "value") if case.training else ("out",)
    pairs = [(_first(case, name, x).detach(), true) for name, x, true in zip(names, found, truth, strict=False)]
    return max(float((x.double() - true).norm() / true.norm()) for x, true in pairs)


def _kernel(variant: Variant, given: Tensors) -> str:
    """The kernel that is chosen; the program is not run, whose scores may be larger than the GPU."""
    reports: list[Report] = []

    def record(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(fuse_graph(gm, inputs, certify="off").meta["attnfuse_report"])
        return lambda *args: args[:1]

    torch.compile(variant.program, backend=record, fullgraph=True, dynamic=False)(**given)
    torch.compiler.reset()
    (report,) = reports
    return ", ".join([site.kernel for site in report.fused] + ["unfused"] * len(report.refused)) or "no site"
