"""What attention costs on a CPU: seconds of each kernel, and of the unfused graph under Inductor.

The model: every score costs its two products, its softmax and each step of its program; each block, each
call and each byte beyond the last-level cache costs extra; masked blocks that a kernel skips cost nothing.
Constants are nanoseconds of one core, measured as the least of 5 runs of thread time on a Zen 4 core (AVX-512,
torch 2.13, Inductor's default options), 8 heads x 512 to 4096 keys x 64 or 128 dimensions: within 15% of
each measured row. What is decided is which of two is faster, and their ratio moves little between machines, but for
that of ATen's flash attention to products of matrices, which is measured (:mod:`attnfuse.kernels.cpu.calibrate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from attnfuse.form import form_of, masked_by
from attnfuse.kernels.cpu import blockmask, blocks
from attnfuse.kernels.cpu.calibrate import speed
from attnfuse.kernels.cpu.chain import steps_of
from attnfuse.kernels.cpu.split import split
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.rows import band_of
from attnfuse.reference import is_float8, weights_dtype
from attnfuse.score import Apply, Index, walk
from attnfuse.spec import AttentionSpec

__all__ = ["blocked", "direct", "flex", "sdpa", "unfused"]


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of one dtype.

    For each score and element of query or value: ``product`` in our matrix products, ``product_unfused`` in
    Inductor's where they differ, ``flash`` in ATen's flash attention, its softmax included. ``pack`` for
    each element of key or value and 256 rows there.
    """

    product: float
    flash: float
    product_unfused: float | None = None
    pack: float = 0.0
    #: Each score: softmax with the conversions around it, in our blocks and in Inductor's loops.
    softmax: float = 1.0
    softmax_plain: float = 1.0
    softmax_unfused: float = 1.2
    tanh: float = 2.5
    #: Each score of a block that is cut from a mask's band: smaller products, more copies.
    band: float = 0.6
    #: Each score, when all of them exceed the last-level cache.
    spilled: float = 1.6
    #: A training step, in forwards.
    training_blocked: float = 4.0
    training_flash: float = 3.8
    training_unfused: float = 2.6
    #: Each score of a captured bias whose gradient is asked for.
    bias_gradient: float = 0.0


FLOAT = Rates(product=0.0211, flash=0.0243, tanh=3.7)
BFLOAT16 = Rates(
    product=0.0095, flash=0.0258, pack=1.0, softmax=1.3, softmax_plain=1.0, softmax_unfused=1.1, tanh=0.7, band=1.2,
    spilled=2.6, training_blocked=3.4, training_unfused=2.2, bias_gradient=4.0,
)  # fmt: skip
#: Our blocks multiply float16 as float32; everybody else multiplies it as it is, which few CPUs can.
HALF = replace(FLOAT, flash=0.0390, pack=1.0, training_flash=18.0, product_unfused=0.45)
#: Our blocks multiply bfloat16 as float32 too where its scores must not be rounded.
EXACT = replace(FLOAT, flash=BFLOAT16.flash, pack=0.5)
DOUBLE = Rates(0.0440, 0.0600, softmax=2.0, softmax_unfused=3.0, tanh=5.0)
RATES = {torch.float32: FLOAT, torch.bfloat16: BFLOAT16, torch.float16: HALF, torch.float64: DOUBLE}

#: Each score: a step in place, a step out of place, a transcendental, Inductor's tanh.
STEP, COPYING_STEP, TRANSCENDENTAL, TANH_UNFUSED = 0.1, 0.8, 0.8, 1.7
#: Each score: a sink behind the keys of our blocks, and Inductor's concatenation.
SINK, SINK_UNFUSED = 0.4, 0.15
#: Each score: a bias that is computed from indices, such as a slope times a distance.
INDEXED_BIAS = 1.4
#: Each score: Inductor's mask, which it computes or reads score by score (0.4 to 3 were measured).
MASK_UNFUSED = 0.4
#: Each score: the derivative of a tanh.
TANH_AGAIN = 2.5
#: Each score of a program that is not compiled: conversions and steps that pass through memory.
EAGER = 2.0
#: Each weight of dropout's mask, drawn by us and by Inductor.
DROPOUT, DROPOUT_UNFUSED = 3.0, 2.0
#: Each score of a mask that ATen's flash attention is handed as a tensor.
MASKED_CALL = 0.7
#: flex_attention's compiled kernel takes so many times as long as our blocks.
FLEX = 1.1
#: Each byte from memory.
BYTE = 0.08
#: Where weights are the result: each byte of one that is copied out of a block, and each score that Inductor's products
#: write and its softmax reads, when all exceed the last-level cache. Fitted to one core of an AMD EPYC, float32, 8
#: heads of 64, 512 and 2048 keys: behind a mask that is a tensor ours takes 1.0 to 1.1 of Inductor's time, behind a
#: causal one 0.8 to 0.87; an eager graph takes 2.2 times ours at 2048 keys. All contain fresh memory for the weights.
BYTE_COPIED, SPILLED_ONCE = 0.2, 0.3
#: Nanoseconds of a block, of a call of our op, of a call of ATen's kernel, of an unfused graph's calls.
BLOCK, CALL, FLASH_CALL, UNFUSED_CALL = 100e3, 150e3, 60e3, 60e3
#: Nanoseconds that a call of an operator written in Python takes before its kernel starts.
OP = 40e3
#: flex_attention's products and softmax, in those of ATen's flash attention, which is blocked alike: float32 on Zen 4
#: (1.69 to 1.85), half types there (2.25 to 2.55), and bfloat16 with AMX, where both pack their operands.
FLEX_FLOAT, FLEX_HALF, FLEX_TILES = 1.7, 2.4, 1.43
#: Each score: a step of its program, and what a tanh or the like adds to that.
FLEX_STEP, FLEX_TRANSCENDENTAL = 0.15, 1.0
#: Nanoseconds of a call at 100 keys. What it is estimated to save must exceed a twentieth: it takes seconds to compile.
FLEX_CALL, FLEX_MARGIN = 300e3, 1.05
#: What a kernel is estimated to save must exceed a tenth while scores stay in the cache: estimates err by as much, and
#: memory is not at stake there.
IN_CACHE_MARGIN = 1.1
#: Bytes of a last-level cache.
CACHE = 32 << 20
_TRANSCENDENTAL = {"tanh", "exp", "log", "sigmoid", "erf", "pow", "sin", "cos"}


def blocked(problem: Problem) -> float:
    """Seconds of :mod:`attnfuse.kernels.cpu.blocked` on this machine's threads, up to weights where wanted."""
    rates, threads = _rates(problem), torch.get_num_threads()
    written = BYTE_COPIED * weights_dtype(problem.spec, problem.query.dtype).itemsize if problem.weights else 0.0
    band = band_of(problem.spec, problem.symbols)
    each = _contraction(problem, rates.product) + _program(problem, rates)
    if problem.spec.normaliser == "softmax":
        each += rates.softmax_plain if problem.plain else rates.softmax
    each += 0.0 if band.open else rates.band
    scores = problem.scores * band.share(problem.rows, problem.keys, blocks.ROWS_IN_BAND)
    each += SINK if problem.spec.sink is not None else 0.0
    calls = BLOCK * math.ceil(scores / (blocks.SCORES * threads)) + CALL
    forward = (scores * each + problem.scores * written + _kv_bytes(problem) * BYTE) / threads + calls
    forward *= 1.0 if _spills(problem) else IN_CACHE_MARGIN
    if not problem.training:
        return forward * 1e-9
    again = TANH_AGAIN * problem.count("tanh") + rates.bias_gradient * any(x.requires_grad for x in problem.captures)
    return (rates.training_blocked * forward + scores * again / threads) * 1e-9


def direct(problem: Problem) -> float:
    """Seconds of :mod:`attnfuse.kernels.cpu.direct`: the written-out program, not compiled."""
    eager = (EAGER * problem.scores / torch.get_num_threads() + CALL - UNFUSED_CALL) * 1e-9
    return (
        _written_out(problem, _rates(problem).product)
        + (_rates(problem).training_unfused if problem.training else 1.0) * eager
    )


def sdpa(problem: Problem, *, called: bool) -> float:
    """Seconds of :mod:`attnfuse.kernels.cpu.sdpa`, ``called`` through our op or standing in the graph."""
    # without a tensor to mask by, Inductor calls the same
    margin = IN_CACHE_MARGIN if problem.captured_bytes and not _spills(problem) else 1.0
    return margin * _flash(problem) + called * OP * 1e-9


def flex(problem: Problem) -> float:
    """Seconds of :mod:`attnfuse.kernels.cpu.flex` under Inductor, plus what it must save to be worth compiling."""
    rates, threads = _rates(problem), torch.get_num_threads()
    parts = split(problem.spec, problem.rows, problem.keys)
    half = problem.query.dtype != torch.float32
    # flash attention that is faster than products is what tiles for half types (AMX) make of it
    slower = FLEX_FLOAT if not half else FLEX_TILES if rates.flash < rates.product else FLEX_HALF
    steps = [part.op for part in walk(parts.score) if isinstance(part, Apply)]
    each = slower * _contraction(problem, rates.flash) + FLEX_STEP * len(steps)
    each += FLEX_TRANSCENDENTAL * sum(op in _TRANSCENDENTAL for op in steps)
    scores = problem.scores * parts.band.share(problem.rows, problem.keys, blockmask.BLOCK)
    # written twice and read once more
    moved = 3 * problem.heads * problem.rows * problem.value.shape[-1] * problem.value.dtype.itemsize * BYTE
    return FLEX_MARGIN * ((scores * each + moved) / threads + FLEX_CALL) * 1e-9


def _flash(problem: Problem) -> float:
    """ATen's CPU flash attention skips masked keys only behind a causal mask, and packs half types first."""
    rates, threads = _rates(problem), torch.get_num_threads()
    band = band_of(problem.spec, problem.symbols)
    masked = not band.open or bool(problem.captured_bytes)
    each = _contraction(problem, rates.flash) + problem.captured_bytes / max(problem.scores, 1) * BYTE * 3
    each += 2.0 if masked and problem.query.dtype != torch.float32 and band.open else 0.0
    packed = rates.pack * problem.heads * math.ceil(problem.rows / 256) * problem.keys * _width(problem)
    scores = problem.scores * band.share(problem.rows, problem.keys, 512)
    steps = rates.training_flash if problem.training else 1.0
    return steps * ((scores * each + packed + _kv_bytes(problem) * BYTE) / threads + FLASH_CALL) * 1e-9


def unfused(problem: Problem) -> float:
    """Seconds of the graph as written, compiled by Inductor unless the problem says that nothing compiles it.

    An unmasked softmax of scaled scores Inductor turns into SDPA by itself, of repeated heads where heads
    are repeated; elsewhere it reads a repeated head where it lies. Whose weights are wanted stays as it is, and what
    reads these is no part of it.
    """
    rates = _rates(problem)
    if problem.source.startswith("sdpa") and _is_flash(problem):
        return _called(problem)
    if problem.source == "flex" and problem.compiled:
        return FLEX * blocked(problem)
    if not problem.compiled:
        return direct(problem)
    if not problem.plain or problem.weights:
        return _written_out(problem, rates.product_unfused or rates.product)
    repeats = problem.query.shape[-3] // max(problem.key.shape[-3], 1)
    # read, written and read again
    copied = 3 * repeats * _kv_bytes(problem) if repeats > 1 else 0
    return _flash(problem) + copied * BYTE / torch.get_num_threads() * 1e-9


def _is_flash(problem: Problem) -> bool:
    """Whether scaled_dot_product_attention would call ATen's flash attention."""
    return not problem.spec.dropout and problem.query.shape[-1] == problem.value.shape[-1]


def _called(problem: Problem) -> float:
    """Seconds of the call of flash attention that the graph has; behind a mask it skips nothing."""
    if problem.source != "sdpa masked":
        return _flash(problem)
    steps = _rates(problem).training_flash if problem.training else 1.0
    bare = replace(problem, spec=AttentionSpec(batch=problem.spec.batch), captures=())
    return _flash(bare) + steps * problem.scores * MASKED_CALL / torch.get_num_threads() * 1e-9


def _written_out(problem: Problem, product: float) -> float:
    rates, threads = _rates(problem), torch.get_num_threads()
    each = _contraction(problem, product) + rates.softmax_unfused
    each += TANH_UNFUSED * problem.count("tanh") + (SINK_UNFUSED if problem.spec.sink is not None else 0.0)
    each += MASK_UNFUSED if masked_by(problem.spec) is not None else 0.0
    each += DROPOUT_UNFUSED if problem.spec.dropout else 0.0
    each += (SPILLED_ONCE if problem.weights else rates.spilled) if _spills(problem) else 0.0
    steps = rates.training_unfused if problem.training else 1.0
    moved = (_kv_bytes(problem) + problem.captured_bytes) * BYTE
    return steps * ((problem.scores * each + moved) / threads + UNFUSED_CALL) * 1e-9


def _spills(problem: Problem) -> bool:
    """Whether float32 scores exceed the last-level cache."""
    return problem.scores * 4 > CACHE


def _rates(problem: Problem) -> Rates:
    # what is float8 is multiplied as float32
    dtype = torch.float32 if is_float8(problem.query.dtype) else problem.query.dtype
    return rates_of(dtype, exact=problem.spec.exact_scores)


def rates_of(dtype: torch.dtype, *, exact: bool = False) -> Rates:
    """The shipped rates, with flash attention as much slower than products as it is measured to be on this machine."""
    shipped = EXACT if exact and dtype == torch.bfloat16 else RATES.get(dtype, FLOAT)
    measured, ours = speed(dtype), speed(torch.float32 if shipped in (HALF, EXACT) else dtype)
    if measured is None or ours is None:
        return shipped
    return replace(shipped, flash=shipped.product * measured.flash / ours.product)


def _width(problem: Problem) -> int:
    return problem.query.shape[-1] + problem.value.shape[-1]


def _contraction(problem: Problem, rate: float) -> float:
    return rate * _width(problem)


def _program(problem: Problem, rates: Rates) -> float:
    """Nanoseconds of a score's programs in the blocked kernel; a mask that is a band is nearly free."""
    spec = problem.spec
    form = form_of(spec.score)
    steps = [part.op for part in walk(spec.score) if isinstance(part, Apply)]
    cost = rates.tanh * steps.count("tanh") + (DROPOUT if spec.dropout else 0.0)
    if form is None:
        cost += (COPYING_STEP if steps_of(spec.score) is None else STEP) * len(steps)
    else:
        masked = form.keep and not band_of(spec, problem.symbols).exact
        cost += INDEXED_BIAS * any(isinstance(part, Index) for summand in form.bias for part in walk(summand))
        cost += STEP * (len(form.bias) + 2 * (form.softcap is not None) + 2 * bool(masked))
    cost += TRANSCENDENTAL * sum(op in _TRANSCENDENTAL - {"tanh"} for op in steps)
    cost += COPYING_STEP * sum(isinstance(part, Apply) for part in walk(spec.weight))
    return cost + problem.captured_bytes / max(problem.scores, 1) * BYTE * 2


def _kv_bytes(problem: Problem) -> int:
    return problem.key.bytes + problem.value.bytes
