"""What attention costs on a GPU: seconds of our kernels, of cuDNN's, and of the unfused graph under Inductor.

The model is a roofline: operations over the rate that the matrix units reach in that kernel, and what each block of
rows takes beside them, or bytes over the memory's bandwidth, whichever takes longer; and a launch. Peaks are the
vendors'; the rest was measured on an H200 with torch 2.11 (512 to 16384 keys, heads of 64, 128 and 256) and is taken
for all targets: what is decided is which of two is faster on one device. ``tests/kernels/test_chosen_as_measured.py``
holds the choices to what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnfuse.kernels.float8 import product_types
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.rows import masking_band
from attnfuse.reference import weights_dtype
from attnfuse.target import Target

__all__ = ["ROWS_OF_TILE", "STREAMED", "TANH", "Device", "cudnn", "device_of", "triton", "unfused", "weights"]


@dataclass(frozen=True)
class Device:
    """Peaks: dense products of float8, of half types and of TF32 or its like, operations a second; bytes a second of
    memory.
    """

    float8: float
    half: float
    tf32: float
    bandwidth: float
    processors: int


_DEVICES = {
    "cuda:sm80": Device(312e12, 312e12, 156e12, 1.9e12, 108),
    "cuda:sm90": Device(1979e12, 990e12, 495e12, 4.3e12, 132),
    "cuda:sm100": Device(4500e12, 2250e12, 1100e12, 7.5e12, 148),
    "rocm:gfx942": Device(2600e12, 1300e12, 650e12, 5.0e12, 304),
    "rocm:gfx950": Device(5000e12, 2500e12, 1250e12, 7.5e12, 256),
    "xpu:pvc": Device(800e12, 800e12, 400e12, 3.0e12, 128),
}
_BY_KIND = {"cuda": "cuda:sm90", "rocm": "rocm:gfx942", "xpu": "xpu:pvc"}

#: Shares of the peak that the two products reach, by head size at most: cuDNN's forward, our Triton forward.
_CUDNN = ((64, 0.465), (128, 0.61), (512, 0.66))
_TRITON = ((64, 0.42), (128, 0.46), (256, 0.50), (512, 0.12))
#: Where scores are of float8, value's columns contiguous; what its transpose saves is in the price tables. With it
#: heads of 256 reach 451 and 432 TFLOP/s at 4096 and 16384 keys, less than the half types.
_TRITON_FLOAT8 = ((64, 0.30), (128, 0.345), (256, 0.195), (512, 0.09))
#: Behind a band cuDNN loses more than the scores of cut tiles, and more than other kernels, whose rates are those
#: without one: it keeps 0.88 at 4096 keys and 0.92 at 8192, the Gluon kernel 0.93 and 0.95.
_CUDNN_BANDED = 0.95
#: What Triton's forward keeps there, its backward keeping all: 320 TFLOP/s of 416 with slopes and heads of 64, in which
#: a block's own time is counted too.
_TRITON_BANDED = ((64, 0.86), (512, 1.0))
#: Backward: operations are 2.5 times the forward's, at this share of the forward's rate; by head size at most.
#: Triton's beyond 256 is a guess. Heads of 256 have larger tiles on Hopper, unless a tensor is read for each score.
_CUDNN_BACKWARD = ((64, 1.0), (128, 0.87), (512, 0.58))
_TRITON_BACKWARD = ((64, 0.62), (128, 0.80), (256, 0.29), (512, 0.20))
_TRITON_BACKWARD_APART = (*_TRITON_BACKWARD[:2], (256, 0.58), _TRITON_BACKWARD[3])
#: Seconds of a block of rows beside its products, cuDNN's and Triton's; and bytes for each number of query that go to
#: and fro beside a backward's products: sums of rows, zeros for dQ, its rounding.
_CUDNN_BLOCK = ((64, 1.2e-6), (128, 1.9e-6), (512, 1.8e-6))
_TRITON_BLOCK, STREAMED = ((64, 1.2e-6), (128, 1.9e-6), (512, 4e-6)), 14
#: In forwards, the gradient of a captured tensor that varies along rows and keys.
_CAPTURED_BACKWARD = 0.3
#: The share of the peak that batched products reach.
_PRODUCTS = 0.65
#: Seconds of a launch, of our operator written in Python, of a graph's launches.
_LAUNCH, _OP, _UNFUSED_LAUNCHES = 5e-6, 10e-6, 15e-6
#: How often Inductor moves the scores: written, read for the maximum and the sum, written as weights, read.
_PASSES, _PASSES_TRAINING, _PASSES_EAGER = 5.0, 8.0, 20.0
#: Rows of a tile.
ROWS_OF_TILE = 128
#: A tanh, in operations of the matrix units.
TANH = 40.0


def device_of(target: Target) -> Device:
    """The peaks of a target; those of its vendor's most common one where it is not known."""
    return _DEVICES.get(str(target)) or _DEVICES[_BY_KIND[target.kind]]


def triton(problem: Problem, target: Target) -> float:
    """Seconds of :mod:`attnfuse.kernels.triton`."""
    share = _share(_TRITON_FLOAT8 if _types(problem, target)[0].itemsize == 1 else _TRITON, problem)
    share *= 1.0 if not problem.captured_bytes else 0.7
    banded = 1.0 if masking_band(problem.spec, problem.symbols).open else _share(_TRITON_BANDED, problem)
    work = problem.flops + TANH * problem.scores * problem.count("tanh")
    block = _share(_TRITON_BLOCK, problem)
    apart = target.arch == "sm90" and not problem.captured_bytes
    # a backward is told in forwards, and keeps its own rate
    backward = _share(_TRITON_BACKWARD_APART if apart else _TRITON_BACKWARD, problem) / banded
    return _fused(problem, target, work, share * banded, block, backward)


def cudnn(problem: Problem, target: Target) -> float:
    """Seconds of cuDNN's attention."""
    open_band = masking_band(problem.spec, problem.symbols).open
    share = _share(_CUDNN, problem) * (1.0 if open_band else _CUDNN_BANDED)
    block = _share(_CUDNN_BLOCK, problem)
    return _fused(problem, target, problem.flops, share, block, _share(_CUDNN_BACKWARD, problem))


def weights(problem: Problem, target: Target) -> float:
    """Seconds of :mod:`attnfuse.kernels.triton.weights`: scores are computed twice, weights written once.

    The backward is eager: scores of float32 come and go, and are multiplied once more each way.
    """
    device, share = device_of(target), _share(_TRITON, problem)
    band = masking_band(problem.spec, problem.symbols).share(problem.rows, problem.keys, ROWS_OF_TILE)
    work = 2 * (problem.flops + TANH * problem.scores * problem.count("tanh"))
    written = problem.scores * weights_dtype(problem.spec, problem.query.dtype).itemsize
    moved = _bytes(problem) + problem.captured_bytes + written
    forward = max(work * band / (_peak(problem, target) * share), moved / device.bandwidth) + _LAUNCH + _OP
    if not problem.training:
        return forward
    products = 3 * problem.flops / (device.tf32 * _PRODUCTS)
    return forward + products + _PASSES_EAGER * 4 * problem.scores / device.bandwidth


def _fused(problem: Problem, target: Target, work: float, share: float, block: float, backward: float) -> float:
    device = device_of(target)
    band = masking_band(problem.spec, problem.symbols)
    # too few tiles of rows do not fill the processors
    turns = problem.heads * math.ceil(problem.rows / ROWS_OF_TILE) / device.processors
    rate = _peak(problem, target) * share * min(1.0, turns)
    products = work * band.share(problem.rows, problem.keys, ROWS_OF_TILE) / rate
    forward = max(products + turns * block, _bytes(problem) / device.bandwidth)
    step = 1.0 + 2.5 / backward if problem.training else 1.0
    step += _CAPTURED_BACKWARD if _captured_gradient(problem) else 0.0
    streamed = STREAMED * math.prod(problem.query.shape) / device.bandwidth if problem.training else 0.0
    return step * forward + streamed + _LAUNCH + _OP


def unfused(problem: Problem, target: Target) -> float:
    """Seconds of the graph as written, compiled by Inductor unless the problem says that nothing compiles it.

    A softmax of scaled scores without a mask Inductor turns into SDPA by itself, unless its weights are wanted: then
    they are read for the product with the values whoever computes them.
    """
    if problem.compiled and problem.plain and not problem.weights:
        return cudnn(problem, target) + _UNFUSED_LAUNCHES - _OP
    device = device_of(target)
    products = problem.flops / (_peak(problem, target) * _PRODUCTS)
    passes = _PASSES_EAGER if not problem.compiled else _PASSES
    passes += _PASSES_TRAINING if problem.training else 0.0
    passes -= 1.0 if problem.weights else 0.0
    # a sink is a column that is put beside the scores, and taken off again
    passes *= 2.5 if problem.spec.sink is not None else 1.0
    moved = passes * problem.scores * problem.query.dtype.itemsize + _bytes(problem)
    step = 3.0 if problem.training else 1.0
    return step * products + moved / device.bandwidth + _UNFUSED_LAUNCHES


def _share(table: tuple[tuple[int, float], ...], problem: Problem) -> float:
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    return next((share for widest, share in table if width <= widest), table[-1][1])


def _peak(problem: Problem, target: Target) -> float:
    """Of both products together, which are taken to be of one size."""
    device = device_of(target)
    by_width = {1: device.float8, 2: device.half}
    return 2.0 / sum(1.0 / by_width.get(dtype.itemsize, device.tf32) for dtype in _types(problem, target))


def _types(problem: Problem, target: Target) -> tuple[torch.dtype, torch.dtype]:
    return product_types(problem.spec, problem.dtypes, target, "d")


def _bytes(problem: Problem) -> int:
    return problem.query.bytes + problem.key.bytes + problem.value.bytes + problem.captured_bytes


def _captured_gradient(problem: Problem) -> bool:
    return any(
        x.requires_grad and {"m", "n"} <= set(captured.axes)
        for x, captured in zip(problem.captures, problem.spec.captures, strict=False)
    )
