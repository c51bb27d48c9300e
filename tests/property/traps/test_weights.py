"""Attention whose weights others want: it is fused up to them where a node holds them, and refused where none does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnfuse import fuse_graph, rewrite
from attnfuse.candidates import problems_in
from attnfuse.kernels import choose
from attnfuse.report import Report
from attnfuse.target import Target
from tests.support.doors import as_module
from tests.support.never_wrong import never_wrong, qkv

Both = tuple[Tensor, Tensor]


def weigh(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3, dim=-1)


def gives_weights(report: Report) -> bool:
    (site,) = report.sites
    return bool(report.fused) and "weights returned" in site.what and "v[" not in site.shape


# --- fused up to the weights ------------------------------------------------------------------------


def cast_and_not_dropped(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = F.softmax(q @ k.mT, dim=-1).to(q.dtype)
    weights = F.dropout(weights, 0.1, training=False)
    return weights @ v, weights


def averaged(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = weigh(q, k)
    return weights @ v, weights.mean(1)


def written_into(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = weigh(q, k)
    kept = weights.clone()
    weights.mul_(2.0)
    return weights @ v, kept


def gated_by_head(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = weigh(q, k)
    weights = weights * torch.arange(4)[:, None, None]
    return weights @ v, weights


def two_values(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = weigh(q, k)
    return weights @ v, weights @ k


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Both:
    scores = q @ k.mT
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = powers / powers.sum(-1, keepdim=True)
    return weights @ v, weights


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = torch.softmax(k @ q.mT, dim=-2)
    return weights.mT @ v, weights


def causal_with_empty_rows(q: Tensor, k: Tensor, v: Tensor) -> Both:
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(-2)
    weights = torch.softmax((q @ k.mT).masked_fill(~keep, float("-inf")), dim=-1)
    return weights @ v, weights


def safe(q: Tensor, k: Tensor, v: Tensor) -> Both:
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(-2)
    scores = (q @ k.mT).masked_fill(~keep, float("-inf"))
    weights = torch.where((scores != float("-inf")).any(-1, keepdim=True), torch.softmax(scores, -1), 0.0)
    return weights @ v, weights


def beside_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Both:
    sink = torch.arange(4)[None, :, None, None].expand(*q.shape[:-1], 1).to(q.dtype)
    weights = torch.softmax(torch.cat([q @ k.mT, sink], dim=-1), dim=-1)[..., :-1]
    return weights @ v, weights


def of_heads_in_batches(q: Tensor, k: Tensor, v: Tensor) -> Both:
    """nn.MultiheadAttention's shapes."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.mT), dim=-1)
    return torch.bmm(weights, v), weights.view(2, 4, *weights.shape[1:]).mean(1)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Both:
    weights = weigh(q, k)
    flat = weights.flatten(2)
    return flat.view(weights.shape) @ v, flat


UPTO_WEIGHTS = (
    cast_and_not_dropped, averaged, written_into, gated_by_head, two_values, written_out, transposed,
    causal_with_empty_rows, safe, beside_a_sink, of_heads_in_batches, flattened,
)  # fmt: skip


@pytest.mark.parametrize("program", UPTO_WEIGHTS, ids=lambda each: each.__name__)
def test_fused_up_to_the_weights(door: str, program: Callable[..., Both]) -> None:
    assert gives_weights(never_wrong(door, program, *qkv()))


def test_grouped_heads(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Both:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        weights = weigh(q, k)
        return weights @ v, weights

    report = never_wrong(door, attention, *qkv(kv_heads=2))
    assert gives_weights(report)
    assert "k[2, 2, 9, 8]" in report.fused[0].shape


def test_two_that_share_their_scores(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        left, right = q @ k.mT, (2 * q) @ (3 + k).mT
        first, second = torch.softmax(left, -1), torch.softmax(left * 0.5 + right, -1)
        return first @ v, second @ v, first, second

    assert len(never_wrong(door, attention, *qkv(), sites=2).fused) == 2


def test_masks_of_every_kind(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Both:
        weights = torch.softmax(q @ k.mT + mask, dim=-1)
        return weights @ v, weights

    empty = torch.zeros(2, 1, 6, 9).masked_fill(torch.arange(6)[:, None] < 2, float("-inf"))
    assert gives_weights(never_wrong(door, attention, *qkv(), empty))


def test_sizes_that_are_not_known(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Both:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights @ v, weights

    assert gives_weights(never_wrong(door, attention, *qkv(), dynamic=True))


# --- in training ------------------------------------------------------------------------------------


def test_gradients_through_weights_and_product() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Both:
        weights = torch.softmax(5.0 * torch.tanh(q @ k.mT / 5.0) + bias, dim=-1)
        return weights @ v, weights.square()

    reports: list[Report] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        fused = fuse_graph(graph, inputs, profit=False)
        reports.append(fused.meta["attnfuse_report"])
        return fused.forward

    def gradients(run: Callable[..., Both]) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in args)
        out, weights = run(*leaves)
        return torch.autograd.grad(out.square().sum() + weights.sum(), leaves)

    args = (*qkv(), torch.randn(4, 6, 9))
    torch.compiler.reset()
    torch.testing.assert_close(gradients(torch.compile(attention, backend=backend)), gradients(attention))
    assert gives_weights(reports[0])
    assert not reports[0].fused[0].certificate.skipped


def test_dropout_stays_where_it_is() -> None:
    class Dropped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Both:
            weights = F.dropout(torch.softmax(q @ k.mT, dim=-1), 0.5, training=self.training)
            return weights @ v, weights

    args, run = qkv(), Dropped().train()
    torch.compiler.reset()
    compiled = torch.compile(run, backend=partial(fuse_graph, profit=False))
    torch.manual_seed(3)
    found = compiled(*args)
    torch.manual_seed(3)
    # even its random stream is the source's
    torch.testing.assert_close(found, run(*args))


# --- refused ----------------------------------------------------------------------------------------


def scores_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    scores = q @ k.mT
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights, scores


def logarithms(q: Tensor, k: Tensor, v: Tensor) -> Both:
    logs = torch.log_softmax(q @ k.mT, dim=-1)
    return logs.exp() @ v, logs


def not_yet_divided(q: Tensor, k: Tensor, v: Tensor) -> Both:
    powers = torch.exp(q @ k.mT)
    return powers @ v / powers.sum(-1, keepdim=True), powers


def the_sinks_weight_too(q: Tensor, k: Tensor, v: Tensor) -> Both:
    sink = torch.arange(4)[None, :, None, None].expand(*q.shape[:-1], 1).to(q.dtype)
    weights = torch.softmax(torch.cat([q @ k.mT, sink], dim=-1), dim=-1)
    return weights[..., :-1] @ v, weights


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (scores_too, "the attention scores are returned"),
        (logarithms, "the attention weights are returned"),
        (not_yet_divided, "returned"),
        (the_sinks_weight_too, "the attention weights are returned"),
    ],
)
def test_refused(door: str, program: Callable[..., tuple[Tensor, ...]], what: str) -> None:
    (site,) = never_wrong(door, program, *qkv()).refused
    assert what in site.reason or "also used by" in site.reason
    assert "output_attentions=False" in site.remedy


def test_no_node_of_aten_alone_gives_weights() -> None:
    program = torch.export.export(as_module(averaged), qkv())
    (site,) = rewrite(program, profit=False)[1].refused
    assert site.reason == (
        "the attention weights are also used by mean, and only an operator of attnfuse's own gives them"
    )
    assert site.remedy.startswith("keep it with --custom-op; or ")


def test_the_gate_says_what_would_be_faster() -> None:
    program = torch.export.export(as_module(averaged), qkv())
    (site,) = rewrite(program, custom_op=True, compiled=True)[1].refused
    assert site.reason.startswith("the attention weights are also used by mean, and no kernel is faster: blocked")
    assert "output_attentions=False" in site.remedy


def test_kernels_are_asked_about_weights() -> None:
    (asked,) = problems_in(torch.export.export(as_module(averaged), qkv()))
    assert asked.problem.weights
    assert asked.problem.value.shape == (2, 4, 9, 0)
    able = [each.name for each in choose(asked.problem, Target("cpu")).candidates if each.seconds is not None]
    assert able == ["blocked", "unfused"]
