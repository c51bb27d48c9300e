"""Scales: wherever they stand and whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from attnfuse import fuse_graph
from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import as_module, rewritten
from tests.support.never_wrong import never_wrong, qkv


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5, 1.0, 1e-30, 100.0])
def test_any_number(door: str, scale: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT * scale, v)

    assert never_wrong(door, attention, *qkv()).fused


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (2, 1, 1, 1), (6, 1), (9,), (2, 4, 6, 9)])
def test_a_tensor_along_any_axes(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend(q @ k.mT * scale, v)

    never_wrong(door, attention, *qkv(), torch.randn(shape))


@pytest.mark.parametrize("shape", [(8,), (6, 1), (4, 1, 1), (6, 8)])
def test_a_tensor_on_the_query(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend((q * scale) @ k.mT, v)

    never_wrong(door, attention, *qkv(), torch.randn(shape))


def test_split_over_query_and_key(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = math.sqrt(math.sqrt(q.size(-1)))
        return attend((q / root) @ (k / root).mT, v)

    assert never_wrong(door, attention, *qkv()).fused


def test_after_the_mask(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, -10.0) * 0.5, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.5)


def test_negative_after_an_infinite_mask(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, float("inf")) * -0.5, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.7)


def test_zero_after_an_infinite_mask_is_nan(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, float("-inf")) * 0.0, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.7)


def test_of_the_bias_too(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend((q @ k.mT + bias) / 4, v)

    assert never_wrong(door, attention, *qkv(), torch.randn(6, 9)).fused


def test_after_an_overflow_of_half_precision(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT / 256, v)

    q, k, v = (x.half() for x in qkv())
    never_wrong(door, attention, q * 200, k * 200, v)


def test_of_the_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT, dim=-1) * 0.5) @ v

    never_wrong(door, attention, *qkv())


def test_of_the_weights_by_a_gate(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT, dim=-1) * gate) @ v

    never_wrong(door, attention, *qkv(), torch.randn(4, 1, 9))


def test_squared_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1).square() @ v

    never_wrong(door, attention, *qkv())


def test_of_a_size_that_is_not_known(door: str) -> None:
    """``sqrt`` of a symbolic size is a SymFloat."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT / math.sqrt(q.size(-1)), v)

    args = qkv()
    if door == "core ATen":
        pytest.skip("decomposition specialises the size")
    program = rewritten(door, as_module(attention), args, dynamic=True)
    exact = attention(*(x.double() for x in args))
    assert_as_good(program.run(*args), attention(*args), exact)
    assert all("bug of attnfuse" not in site.reason for site in program.report.refused), program.report


def test_learned(door: str) -> None:
    """A parameter keeps its gradient."""

    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q @ k.mT * self.temperature, v)

    args = qkv()
    program = rewritten(door, Learned(), args)
    exact = Learned().double()(*(x.double() for x in args))
    assert_as_good(program.run(*args).detach(), Learned()(*args).detach(), exact)
    assert len(program.report.fused) == 1, program.report


def test_a_learned_scale_keeps_its_gradient() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        return attend(q @ k.mT * temperature, v)

    def gradient(run: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaf = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        run(*(x.to(dtype) for x in args), leaf).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    args = qkv()
    program = rewritten("dynamo", as_module(attention), (*args, torch.tensor(0.7, requires_grad=True)))
    found = gradient(program.run, torch.float32)
    assert_as_good(found, gradient(attention, torch.float32), gradient(attention, torch.float64))


# --- what happens to the result's rows --------------------------------------------------------------


@pytest.mark.parametrize("how", ["divided by a tensor", "divided by a number", "times a gate"])
def test_rows_that_are_rescaled_keep_their_factor(door: str, how: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        out = torch.softmax(q @ k.mT, dim=-1) @ v
        match how:
            case "divided by a tensor":
                return out / factor
            case "divided by a number":
                return out / 2
        return out * torch.sigmoid(factor)

    assert len(never_wrong(door, attention, *qkv(), torch.rand(2, 4, 6, 1) + 1).fused) == 1


def test_a_gate_of_the_sum_and_a_sink_is_a_sink(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril(-1)
        scores = torch.where(keep, q @ k.mT * 0.3, torch.finfo(torch.float32).min).to(q.dtype)
        gate = (torch.logsumexp(scores, dim=-1) - sinks.view(1, -1, 1)).sigmoid()
        return torch.softmax(scores, dim=-1) @ v * gate.unsqueeze(-1)

    assert never_wrong(door, attention, *qkv(), torch.randn(4)).fused[0].what == "scale 0.3, causal -1, sink"


@pytest.mark.parametrize("other", ["scores", "fill", "factor"])
def test_a_gate_of_something_else_is_no_sink(door: str, other: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril(-1)
        scores = (q @ k.mT * 0.3).masked_fill(~keep, -float("inf") if other == "fill" else -1e4)
        sums = torch.logsumexp(2 * scores if other == "scores" else scores, dim=-1)
        gate = ((2 * sums if other == "factor" else sums) - sinks.view(1, -1, 1)).sigmoid()
        return torch.softmax(scores, dim=-1) @ v * gate.unsqueeze(-1)

    report = never_wrong(door, attention, *qkv(), torch.randn(4), sites=None)
    assert not any("sink" in site.what for site in report.fused)


def test_a_scale_made_of_a_size_that_varies_is_no_bug_of_ours() -> None:
    """The root of a head's size that is not known is no whole number, and no size."""
    reports: list[Report] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        fused = fuse_graph(gm, inputs, profit=False)
        reports.append(fused.meta["attnfuse_report"])
        return fused

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / q.size(-1) ** 0.5, dim=-1) @ v

    given = qkv()
    torch._dynamo.reset()
    found = torch.compile(attention, backend=backend, dynamic=True)(*given)
    torch.testing.assert_close(found, attention(*given))
    assert not any("bug" in site.reason for report in reports for site in report.refused)
