"""The Gluon backward on a Hopper GPU beside those of cuDNN and FlexAttention: as :mod:`benchmark.hopper` has forwards.

A backward counts five products. Times are those of the backward alone, of a forward that kept its lse; a bias
and sinks ask for their gradients too. Errors are the largest of the gradients' of one head. Reached by ``python
scripts/bench.py --hopper``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnfuse.kernels import Residual, lookup
from attnfuse.operands import Operands
from attnfuse.reference import attention
from benchmark.ahead import Prepare
from benchmark.hopper import CASES, Case, Row, by_cudnn, by_flex, captures_of, chosen, error_of, times_of

__all__ = ["backward_rows", "backward_to_compile"]

#: Operations of a backward's five products, in those of a forward's two.
PRODUCTS = 2.5
SHAPES = ((4, 16, 4096, 128), (8, 16, 8192, 128), (1, 32, 16384, 128), (4, 32, 4096, 64))
#: Cases whose captures have gradients; slopes are constants.
LEARNED = ("bias", "sinks")
TARGET, TARGET_OF_PROGRAMS = 1.0, 1.5

Grads = tuple[Tensor, ...]


@dataclass(frozen=True)
class Training:
    """One attention's leaves, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    captures: list[Tensor]
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are asked for."""
        return [self.query, self.key, self.value, *(x for x in self.captures if x.requires_grad)]

    @property
    def needs(self) -> list[bool]:
        """The same, of each operand."""
        return [True] * 3 + [x.requires_grad for x in self.captures]

    def head(self) -> Training:
        """The first head of the first batch, in float64, as leaves."""
        query, key, value, *captures = map(_first, (self.query, self.key, self.value, *self.captures))
        return Training(query, key, value, captures, self.grad[:1, :1].double())


def _first(tensor: Tensor) -> Tensor:
    cut = tensor.detach()[:1, :1]
    return cut.double().requires_grad_() if cut.is_floating_point() else cut


def backward_rows(only: str = "") -> Iterator[Row]:
    """The rows of the cases that are chosen; needs a Hopper GPU and Triton."""
    yield from map(_measured, chosen(tuple(_cases()), only))


def backward_to_compile(only: str = "") -> dict[str, Prepare]:
    """What is to be compiled of them."""
    return {f"{case.name}, backward {case.shape}": partial(_prepared, case) for case in chosen(tuple(_cases()), only)}


def _cases() -> Iterator[Case]:
    for case in CASES:
        if case.peer == "cudnn" and case.shape in SHAPES:
            yield replace(case, target=TARGET)
        elif case.peer == "flex":
            yield replace(case, target=TARGET_OF_PROGRAMS)


def _training(case: Case) -> Training:
    torch.manual_seed(0)
    torch.compiler.reset()
    operands = [torch.randn(case.shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    captures = [x.requires_grad_(case.name in LEARNED) for x in captures_of(case, "cuda")]
    query, key, value = (x.requires_grad_() for x in operands[:3])
    return Training(query, key, value, captures, operands[3])


def _prepared(case: Case) -> Callable[[], object]:
    training = _training(case)
    runs = _peer(case, training), _ours(case, training)
    return lambda: [run() for run in runs]


def _measured(case: Case) -> Row:
    training = _training(case)
    peer, ours = _peer(case, training), _ours(case, training)
    true = _true(case, training.head())
    errors = [_largest(run(), true) for run in (peer, ours)]
    peer_ms, ours_ms = times_of([peer, ours])
    flops = PRODUCTS * case.flops
    return Row(
        f"{case.name}, backward {case.shape}", case.peer, peer_ms, ours_ms, flops / peer_ms / 1e9,
        flops / ours_ms / 1e9, peer_ms / ours_ms, case.target, *errors,
    )  # fmt: skip


def _peer(case: Case, given: Training) -> Callable[[], Grads]:
    operands = (given.query, given.key, given.value)
    run = by_cudnn(case, *operands) if case.peer == "cudnn" else by_flex(case, *operands, given.captures)
    out = run()
    return lambda: torch.autograd.grad(out, given.leaves, given.grad, retain_graph=True)


def _ours(case: Case, given: Training) -> Callable[[], Grads]:
    kernel = lookup("gluon")
    query, key, value, *captures = (x.detach() for x in (given.query, given.key, given.value, *given.captures))
    operands = Operands(query, key, value, tuple(captures))
    residual = Residual(*kernel.run_with_lse(case.spec, operands))

    def run() -> Grads:
        found = kernel.backward(case.spec, given.grad, operands, given.needs, residual)
        return tuple(x for x in found if x is not None)

    return run


def _true(case: Case, head: Training) -> Grads:
    out, _ = attention(case.spec, Operands(head.query, head.key, head.value, tuple(head.captures)))
    return torch.autograd.grad(out, (head.query, head.key, head.value), head.grad)


def _largest(found: Grads, true: Grads) -> float:
    """Of query, key and value: a capture's gradient sums heads and batches."""
    return max(error_of(x[:1, :1], want) for x, want in zip(found, true, strict=False))
