"""Measures the same variants on a GPU, at the size of a model in use: every peer of one variant side by side.

Bfloat16, 32 heads, 8192 tokens of all batches together; forward alone, and forward with backward. Times are medians of
device events, peers in turn within a round, so that a device that slows down slows all. Where any peer's call takes
less than :data:`BRIEF`, which is no longer than Python and torch.compile may take to issue one, all calls of the row
are replayed from CUDA graphs, ours and the peers' alike: what is compared is the device's work.

Errors are against float64 of one key head of the first batch, ``norm(found - true) / norm(true)``: of the output, in
training of the worst of the gradients of query, key and value.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import attnfuse
from benchmark.ahead import Prepare
from benchmark.byhand import Tensors
from benchmark.cases import VARIANTS, Case, Variant
from benchmark.peers import OURS, PEERS

__all__ = ["GpuCase", "GpuRow", "gpu_cases", "in_turn", "interleaved", "measure_gpu", "seconds", "to_compile"]

HEADS, WIDTH, LENGTH, TOKENS = 32, 128, 4096, 8192
#: Decoding's numbers of keys, one query row each, and its batch.
DECODED, DECODED_BATCH = (4096, 32768), 16
ROUNDS, SECONDS = 11, 0.02
#: Seconds of a call that is replayed from a CUDA graph.
BRIEF = 2.5e-3

_NOT_COMPILED, _PROGRAMS = ("eager", "SDPA by hand"), ("eager", "inductor", OURS)

Call = Callable[[], object]


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


def measure_gpu(case: GpuCase, peers: Sequence[str] = tuple(PEERS)) -> GpuRow:
    """The row of ``case``, of these peers."""
    given = case.inputs()
    truth = _truth(case, given)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name in peers:
        with _noted(absent, name):
            torch.compiler.reset()
            step = _step(name, case, given)
            if step is None:
                absent[name] = "cannot express it"
                continue
            errors[name] = _error(case, step(), truth)
            step()
            calls[name] = step
    if calls and min(seconds(call, 3) for call in calls.values()) < BRIEF:
        calls = _all_graphed(calls, absent)
    return GpuRow(case, interleaved(calls), _kernel(case.variant, given), errors, absent)


def to_compile(cases: Sequence[GpuCase], peers: Sequence[str] = tuple(PEERS)) -> dict[str, Prepare]:
    """What :func:`benchmark.ahead.compile_ahead` is to compile of these rows, what takes longest first."""
    tasks = ((case, peer) for case in cases for peer in peers if peer not in _NOT_COMPILED)
    ordered = sorted(tasks, key=lambda task: not task[0].training)
    return {f"{case}: {peer}": partial(_prepared, peer, case) for case, peer in ordered}


def _prepared(peer: str, case: GpuCase) -> Call | None:
    return _step(peer, case, case.inputs())


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


@contextmanager
def _noted(absent: dict[str, str], name: str) -> Iterator[None]:
    """A peer's failure is a result, and is printed as one."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        gc.collect()
        torch.cuda.empty_cache()


def _all_graphed(calls: dict[str, Call], absent: dict[str, str]) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, call in calls.items():
        with _noted(absent, name):
            found[name] = _graphed(call)
    return found


def _graphed(step: Call) -> Call:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def interleaved(calls: dict[str, Call]) -> dict[str, float]:
    """Milliseconds of each call: :func:`in_turn`."""
    return in_turn({name: partial(seconds, call) for name, call in calls.items()}, SECONDS)


def in_turn(clocks: Mapping[str, Callable[[int], float]], least: float) -> dict[str, float]:
    """Milliseconds by each clock: medians of rounds in which each has its turn, in an order of the round's own.

    A clock is given how often to call, and says how many seconds a call took; a turn takes ``least`` seconds. The clock
    of a device that is short of power depends on what ran before.
    """
    repeats = {name: max(1, math.ceil(least / clock(3))) for name, clock in clocks.items()}
    order, shuffle = list(clocks), random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        shuffle(order)
        rounds.append({name: clocks[name](repeats[name]) for name in order})
    return {name: statistics.median(each[name] for each in rounds) * 1e3 for name in clocks}


def seconds(call: Call, repeats: int) -> float:
    """Seconds of a call, by the device's clock, one after another so many times."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # the device is at work when the clock starts, as it is in a loop: Python's part of the first call is not waited for
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


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
    """In float64: the output, in training the gradients of query, key and value."""
    wide = {name: _first(case, name, x).detach().double() for name, x in given.items()}
    if not case.training:
        return (case.variant.program(**wide),)
    leaves = [wide[name].requires_grad_() for name in ("query", "key", "value")]
    return torch.autograd.grad(case.variant.program(**wide), leaves, _first(case, "out", _gradient(case)).double())


def _error(case: GpuCase, found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    names = ("query", "key", "value") if case.training else ("out",)
    pairs = [(_first(case, name, x).detach(), true) for name, x, true in zip(names, found, truth, strict=False)]
    return max(float((x.double() - true).norm() / true.norm()) for x, true in pairs)


def _kernel(variant: Variant, given: Tensors) -> str:
    report = attnfuse.explain(variant.program, **given, options={"certify": "off"})
    return ", ".join([site.kernel for site in report.fused] + ["unfused"] * len(report.refused)) or "no site"
