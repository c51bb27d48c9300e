"""Hazards: values that are used elsewhere, returned, or changed in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from attnfuse import fuse_graph
from tests.support.doors import as_module, rewritten
from tests.support.never_wrong import never_wrong, qkv


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


# --- used elsewhere ---------------------------------------------------------------------------------


def test_weights_returned(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights @ v, weights

    never_wrong(door, attention, *qkv())


def test_weights_used_twice(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights @ v, weights @ (2 * v)

    never_wrong(door, attention, *qkv())


def test_weights_averaged_over_heads(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights @ v, weights.mean(1)

    never_wrong(door, attention, *qkv())


def test_weights_with_a_hook() -> None:
    """A hook sees the weights' gradient, so there must be weights."""
    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        weights.register_hook(seen.append)
        return weights @ v

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = tuple(x.requires_grad_() for x in args)
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    args = qkv()
    torch.compiler.reset()
    run = torch.compile(attention, backend=partial(fuse_graph, profit=False))
    for ours, theirs in zip(gradients(run), gradients(attention), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(seen) == 2
    torch.testing.assert_close(*seen)


def test_a_weight_that_the_backward_needs() -> None:
    """A function of one's own saves the weights."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weights: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(weights, v)
            return weights @ v

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            weights, v = ctx.saved_tensors
            return 2 * gradient @ v.mT, weights.mT @ gradient  # twice what it should be, on purpose

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Product.apply(torch.softmax(q @ k.mT, dim=-1), v)

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = tuple(x.requires_grad_() for x in args)
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    args = qkv()
    torch.compiler.reset()
    run = torch.compile(attention, backend=partial(fuse_graph, profit=False))
    for ours, theirs in zip(gradients(run), gradients(attention), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scores_returned(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return attend(scores, v), scores

    never_wrong(door, attention, *qkv())


def test_weights_applied_to_their_own_result(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights @ (weights @ v)

    never_wrong(door, attention, *qkv(rows=9, keys=9), sites=2)


def test_views_of_keys_and_values_returned_as_a_cache(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return attend(q @ k.transpose(-1, -2), v), k, v

    q, k, v = qkv()
    assert never_wrong(door, attention, q, k.transpose(1, 2), v.transpose(1, 2)).fused


def test_two_attentions_in_a_row(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(attend(q @ k.mT, v) @ k.mT, v)

    assert len(never_wrong(door, attention, *qkv(), sites=2).fused) == 2


def test_two_attentions_share_keys_and_values(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v) + attend((q * 2) @ k.mT, v)

    assert len(never_wrong(door, attention, *qkv(), sites=2).fused) == 2


def test_attention_of_a_tensor_to_itself(door: str) -> None:
    def attention(x: Tensor) -> Tensor:
        return attend(x @ x.mT, x)

    assert never_wrong(door, attention, torch.randn(2, 4, 6, 8)).fused


def test_attention_of_repeated_heads_to_themselves(door: str) -> None:
    """A certificate that drew the repeated tensor apart from the one that it repeats would find a difference."""

    def attention(k: Tensor, v: Tensor) -> Tensor:
        many = k.repeat_interleave(2, dim=1)
        return attend(many @ many.mT, v.repeat_interleave(2, dim=1))

    assert never_wrong(door, attention, torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)).fused


def test_the_logarithm_of_weights(door: str) -> None:
    """It is finite where the weight is zero, and what is computed from the weight is not."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.log_softmax(100.0 * q @ k.mT, dim=-1).abs() @ v

    report = never_wrong(door, attention, *qkv())
    assert "logarithm" in report.refused[0].reason


def test_a_router(door: str) -> None:
    def route(x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        weights = torch.softmax(F.linear(x, gates), dim=-1)
        return torch.einsum("te,teh->th", weights, torch.einsum("td,edh->teh", x, experts))

    never_wrong(door, route, torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 8, 4), sites=None)


# --- changed in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["q", "k", "v"])
@pytest.mark.parametrize("when", ["before", "between", "after the softmax", "after"])
def test_an_operand_is_changed(door: str, changed: str, when: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        victim = {"q": q, "k": k, "v": v}[changed]
        if when == "before":
            victim.add_(1)
        scores = q @ k.mT
        if when == "between":
            victim.mul_(2)
        weights = torch.softmax(scores, dim=-1)
        if when == "after the softmax":
            victim.neg_()
        out = weights @ v
        if when == "after":
            victim.zero_()
        return out

    never_wrong(door, attention, *qkv())


def test_a_view_of_the_key_is_changed(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = k[:, :, 0]
        scores = q @ k.mT
        first.zero_()
        return attend(scores, v)

    never_wrong(door, attention, *qkv())


def test_a_mask_is_changed_after_it_was_read(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT + bias
        bias.zero_()
        return attend(scores, v)

    never_wrong(door, attention, *qkv(), torch.randn(6, 9))


def test_scores_are_changed_in_place(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT
        scores *= 0.5
        scores += bias
        scores.masked_fill_(bias > 1, float("-inf"))
        return attend(scores, v)

    never_wrong(door, attention, *qkv(), torch.randn(6, 9))


def test_scores_are_changed_through_a_view(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores[..., 0] = -5.0
        return attend(scores, v)

    never_wrong(door, attention, *qkv())


def test_scores_are_changed_through_a_flat_view(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.view(-1).mul_(0.25)
        return attend(scores, v)

    never_wrong(door, attention, *qkv())


def test_scores_are_changed_after_the_softmax(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        weights = torch.softmax(scores, dim=-1)
        scores.zero_()
        return weights @ v

    never_wrong(door, attention, *qkv())


def test_weights_are_changed_after_the_product(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, dim=-1)
        out = weights @ v
        return out, weights.mul_(2)

    never_wrong(door, attention, *qkv())


def test_weights_are_changed_before_the_product(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        weights[..., 0] = 0.0
        return weights @ v

    never_wrong(door, attention, *qkv())


def test_the_result_is_changed(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q @ k.mT, v)
        out += v.mean()
        out[:, 0] = 1.0
        return out

    assert never_wrong(door, attention, *qkv()).fused


def test_the_query_is_overwritten_with_the_result(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q.copy_(attend(q @ k.mT, v))
        return q * 2

    never_wrong(door, attention, *qkv())


def test_a_cache_is_filled_between(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, :9] = k
        scores = q @ cache.mT
        cache[:, :, 9:] = v
        return attend(scores, cache)

    never_wrong(door, attention, *qkv(), torch.zeros(2, 4, 18, 8))


# --- viewed ---------------------------------------------------------------------------------------


def test_a_view_that_depends_on_strides(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v).view(8, 6, 8).view(-1)

    assert never_wrong(door, attention, *qkv()).fused


def test_a_view_of_turned_values(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k), dim=-1)
        return torch.einsum("bhmn,bnhe->bmhe", weights, v).reshape(2, 6, 32).contiguous().view(2, 6, 4, 8)

    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv())
    assert never_wrong(door, attention, q, k, v).fused


# --- sinks ------------------------------------------------------------------------------------------


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, join: str, cut: slice) -> Tensor:
    column = sinks.view(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), -1)
    scores = q @ k.mT
    columns = [scores, column] if join == "last" else [column, scores]
    return torch.softmax(torch.cat(columns, dim=-1), dim=-1)[..., cut] @ v


@pytest.mark.parametrize("join", ["first", "last"])
@pytest.mark.parametrize("cut", [slice(None, -1), slice(1, None)])
def test_a_sink_may_be_cut_off_on_the_wrong_side(door: str, join: str, cut: slice) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return with_sinks(q, k, v, sinks, join, cut)

    report = never_wrong(door, attention, *qkv(), torch.randn(4))
    assert not report.fused or (join, cut) == ("last", slice(None, -1)) or (join, cut) == ("first", slice(1, None))


def test_a_sink_that_is_given_a_value(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return with_sinks(q, k, torch.cat([v, v[:, :, :1]], dim=2), sinks, "last", slice(None))

    never_wrong(door, attention, *qkv(), torch.randn(4))


def test_a_sink_that_differs_by_row(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], dim=-1)
        return torch.softmax(scores, dim=-1)[..., :-1] @ v

    never_wrong(door, attention, *qkv())


# --- dropout ----------------------------------------------------------------------------------------


def test_dropout_keeps_its_distribution(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(torch.softmax(q @ k.mT, dim=-1), p=0.25, training=True) @ v

    # no scores, so that weights are equal, and values that show each weight
    q, k, v = torch.zeros(2, 4, 64, 8), torch.zeros(2, 4, 64, 8), torch.eye(64).expand(2, 4, 64, 64).contiguous()
    program = rewritten(door, as_module(attention), (q, k, v))
    weights = program.run(q, k, v) * 64
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 0.75))
    # five standard deviations of a share of as many independent draws
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    assert program.report.fused
    assert any("dropout" in note for note in program.report.fused[0].notes)


# --- settings of the user ---------------------------------------------------------------------------


def test_the_precision_of_products_stays_the_user_s(door: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        never_wrong(door, lambda q, k, v: attend(q @ k.mT, v), *qkv())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


#: Each has the storage of what it is given, or of one of several.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ravel": Tensor.ravel,
    "adjoint": Tensor.adjoint,
    "real": lambda x: x.real,
    "data": lambda x: x.data,
    "positive": torch.positive,
    "at least 3-D": torch.atleast_3d,
    "nothing dropped": partial(F.dropout, p=0.1, training=False),
    "broadcast": lambda x: torch.broadcast_tensors(torch.ones(x.shape[-1]), x)[1],
    "one chunk": lambda x: x.unsafe_chunk(1)[0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_written_through_a_view(name: str) -> None:
    """The scores were computed before it was."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        VIEWS[name](k).mul_(2)
        return attend(scores, v)

    exactly_in_place(attention, *qkv())


def test_what_is_written_through_another_input() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, part: Tensor) -> Tensor:
        scores = q @ k.mT
        part.mul_(2)
        return attend(scores, v)

    q, k, v = qkv()
    exactly_in_place(attention, q, k, v, k[0])


def exactly_in_place(attention: Callable[..., Tensor], *given: Tensor) -> None:
    """Under Dynamo, nothing being certified or refused for want of profit: the result, and what was written."""

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        return fuse_graph(gm, inputs, profit=False, certify="off")

    kept = [x.clone() for x in given[:3]]
    again = (*kept, *(kept[1][0] for _ in given[3:]))
    expected = attention(*given)
    torch._dynamo.reset()
    found = torch.compile(attention, backend=backend)(*again)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(kept, list(given[:3]))


@pytest.mark.parametrize("written", ["key", "product"])
def test_a_broadcast_product_that_is_written_before_it_is_summed(written: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        product = q[:, :, :, None, :] * k[:, :, None]
        (k if written == "key" else product).mul_(2)
        return attend(product.sum(-1), v)

    exactly_in_place(attention, *qkv())
