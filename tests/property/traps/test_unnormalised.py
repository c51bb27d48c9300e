"""Two products without a softmax: fused where they are attention, left alone where they are anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.doors import rewritten
from tests.support.never_wrong import never_wrong, qkv

INF = float("inf")


def tril(rows: int = 6, keys: int = 9) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


# --- attention --------------------------------------------------------------------------------------


def test_sigmoid_attention(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.mT * 0.3 - 2.0) @ v

    assert never_wrong(door, attention, *qkv()).fused[0].what == "no softmax, program"


@pytest.mark.parametrize("fill", [-INF, -1e9])
def test_a_mask_before_a_sigmoid_leaves_no_weight(door: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril(3)
        return torch.sigmoid((q @ k.mT * 0.3).masked_fill(~keep, fill)) @ v

    assert never_wrong(door, attention, *qkv()).fused[0].what == "no softmax, program, causal 3"


def test_a_mild_fill_before_a_sigmoid_leaves_a_weight(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril(3)
        return torch.sigmoid((q @ k.mT * 0.3).masked_fill(~keep, -3.0)) @ v

    assert "causal" not in never_wrong(door, attention, *qkv()).fused[0].what


def test_squared_relu(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril(3)
        return (F.relu(q @ k.mT / 9) ** 2 * keep) @ v

    assert never_wrong(door, attention, *qkv()).fused[0].what == "no softmax, program, causal 3"


@pytest.mark.parametrize("how", ["product", "tril", "masked_fill", "where"])
def test_the_masked_product_of_linear_attention(door: str, how: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, keep = q @ k.mT, torch.ones(6, 6, dtype=torch.bool).tril()
        match how:
            case "product":
                scores = scores * torch.tril(torch.ones(6, 6, dtype=q.dtype))
            case "tril":
                scores = scores.tril()
            case "masked_fill":
                scores = scores.masked_fill(~keep, 0.0)
            case "where":
                scores = torch.where(keep, scores, 0.0)
        return scores @ v

    assert never_wrong(door, attention, *qkv(keys=6)).fused[0].what == "no softmax, causal"


def test_retention_decays_with_distance(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        distance = torch.arange(6)[:, None] - torch.arange(6)[None, :]
        decay = torch.where(distance >= 0, torch.exp(rates[:, None, None] * distance), 0.0).to(q.dtype)
        return torch.einsum("bhmn,bhne->bhme", torch.einsum("bhmd,bhnd->bhmn", q, k) * decay, v)

    assert "causal" in never_wrong(door, attention, *qkv(keys=6), -torch.rand(4)).fused[0].what


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.softplus, F.leaky_relu])
def test_other_activations(door: str, activation: Any) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (activation(q @ k.mT) * keep) @ v

    never_wrong(door, attention, *qkv(), torch.rand(2, 1, 1, 9) < 0.7, sites=None)


def test_a_masked_key_of_nan_weighs_nothing(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(torch.ones(6, 9, dtype=torch.bool).tril(), q @ k.mT, 0.0) @ v

    never_wrong(door, attention, *qkv())


def test_dropout_of_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(torch.sigmoid(q @ k.mT), 0.0) @ v

    assert never_wrong(door, attention, *qkv()).fused


def test_shared_heads_and_flat_batches(door: str) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.repeat_interleave(2, 1).mT) @ v.repeat_interleave(2, 1)

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.sigmoid(torch.bmm(q, k.mT)), v)

    assert "k[2, 2, 9, 8]" in never_wrong(door, grouped, *qkv(kv_heads=2)).fused[0].shape
    assert never_wrong(door, flat, *(x.flatten(0, 1) for x in qkv())).fused


# --- not attention, or not to be fused --------------------------------------------------------------


def test_a_normaliser_that_is_no_softmax_is_refused(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).relu()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) @ v

    report = never_wrong(door, attention, *qkv())
    assert "needs all of them at once" in report.refused[0].reason


def test_weights_returned(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid(q @ k.mT)
        return weights @ v, weights

    assert "are returned" in never_wrong(door, attention, *qkv()).refused[0].reason


def test_products_without_anything_between_are_left_to_associativity(door: str) -> None:
    def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3) @ v

    never_wrong(door, chain, *qkv(), sites=0)


def test_operands_without_a_common_axis(door: str) -> None:
    def perceptron(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(x @ a) @ b

    never_wrong(door, perceptron, torch.randn(2, 3, 5, 8), torch.randn(8, 16), torch.randn(16, 4), sites=0)
    never_wrong(door, perceptron, torch.randn(5, 8), torch.randn(8, 16), torch.randn(16, 4), sites=0)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = (nn.Parameter(torch.randn(4, *shape)) for shape in ((8, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.rise) @ self.fall


class Projected(nn.Module):
    """A projection by einsum, then a product of queries and keys: the projection is not a score."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.relu(torch.einsum("bhmd,hde->bhme", q, self.weight)) @ k.mT


@pytest.mark.parametrize(("module", "shapes"), [(Experts(), [(4, 5, 8)]), (Projected(), [(2, 4, 5, 8), (2, 4, 6, 8)])])
def test_parameters_are_no_keys_and_values(door: str, module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    args = tuple(torch.randn(shape) for shape in shapes)
    assert not rewritten(door, module, args).report.sites
