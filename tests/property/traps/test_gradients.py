"""Gradients that a program cuts off: a fused node must not let through what ``detach`` or ``no_grad`` stopped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import as_module, rewritten
from tests.support.never_wrong import qkv

Attention = Callable[..., Tensor]


def detached_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT + bias).detach(), dim=-1) @ v


def detached_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + bias, dim=-1).detach() @ v


def detached_sum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    exps = torch.exp(q @ k.mT + bias)
    return (exps / exps.sum(dim=-1, keepdim=True).detach()) @ v


def detached_logsumexp(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    return torch.exp(scores - scores.logsumexp(dim=-1, keepdim=True).detach()) @ v


def straight_through(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    return torch.softmax(scores + (torch.tanh(scores) - scores).detach(), dim=-1) @ v


def weights_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        weights = torch.softmax(q @ k.mT + bias, dim=-1)
    return weights @ v


def product_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.mT
    return torch.softmax(scores + bias, dim=-1) @ v


def sum_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    exps = torch.exp(q @ k.mT + bias)
    with torch.no_grad():
        total = exps.sum(dim=-1, keepdim=True)
    return (exps / total) @ v


def detached_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.detach().mT + bias, dim=-1) @ v


def detached_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + bias.detach(), dim=-1) @ v


def scale_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        scale = bias[:, :1, :1].exp()
    return torch.softmax(q @ k.mT * scale, dim=-1) @ v


def detached_maximum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    exps = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
    return (exps / exps.sum(dim=-1, keepdim=True)) @ v


def maximum_of_detached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    return torch.softmax(scores - scores.detach().amax(dim=-1).unsqueeze(-1), dim=-1) @ v


def maximum_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    with torch.no_grad():
        highest = scores.amax(dim=-1).unsqueeze(-1)
    return torch.softmax(scores - highest, dim=-1) @ v


def all_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        out = torch.softmax(q @ k.mT + bias, dim=-1) @ v
    return out * bias[..., :1]


def mask_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    with torch.no_grad():
        mask = torch.full_like(scores, float("-inf")).triu(1) + (scores < -1) * -1e9
    return torch.softmax(scores + mask, dim=-1) @ v


#: A softmax whose gradient is cut is none of a fused node's.
CUT = (
    detached_scores,
    detached_weights,
    detached_sum,
    detached_logsumexp,
    straight_through,
    weights_without_gradient,
    product_without_gradient,
    sum_without_gradient,
)
#: What the fused node is handed may be cut off before, and what no result depends on is not differentiated.
FUSED = (
    detached_key,
    detached_bias,
    scale_without_gradient,
    detached_maximum,
    maximum_of_detached,
    maximum_without_gradient,
    all_without_gradient,
    mask_without_gradient,
)


def named(attention: Attention) -> str:
    return attention.__name__


@pytest.mark.parametrize("attention", CUT, ids=named)
def test_a_gradient_that_is_cut_off_stays_so(attention: Attention) -> None:
    assert not _trained("dynamo", attention).fused


@pytest.mark.parametrize("attention", FUSED, ids=named)
def test_what_is_cut_off_before_or_around_it_is_fused(attention: Attention) -> None:
    assert len(_trained("dynamo", attention).fused) == 1


@pytest.mark.parametrize("attention", [*CUT[:5], detached_key, detached_maximum], ids=named)
def test_an_exported_program_is_trained_as_its_source(attention: Attention) -> None:
    _trained("training IR", attention)


@pytest.mark.parametrize("attention", [detached_scores, detached_weights, straight_through], ids=named)
def test_nothing_is_cut_where_nothing_is_differentiated(attention: Attention) -> None:
    args = (*qkv(), torch.randn(4, 6, 9))
    program = rewritten("dynamo", as_module(attention), args)
    exact = attention(*(x.double() for x in args))
    assert_as_good(program.run(*args), attention(*args), exact)
    assert len(program.report.fused) == 1, program.report


def _trained(door: str, attention: Attention) -> Report:
    """What was done to ``attention``, whose gradients are the source's."""
    args = tuple(x.requires_grad_() for x in (*qkv(), torch.randn(4, 6, 9)))
    program = rewritten(door, as_module(attention), args)
    found, source = _gradients(program.run, args), _gradients(attention, args)
    exact = _gradients(attention, tuple(x.double() for x in args))
    for ours, theirs, truth in zip(found, source, exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None and truth is not None:
            assert_as_good(ours, theirs, truth)
    for site in program.report.refused:
        assert "bug of attnfuse" not in site.reason, program.report
    return program.report


def _gradients(run: Attention, args: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in args)
    out = run(*leaves)
    if not out.requires_grad:
        return (None,) * len(leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad(out, leaves, weights, allow_unused=True)
