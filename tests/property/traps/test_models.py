"""Forms that real models write, each fused: what a library's release taught, in as few lines as show it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.never_wrong import never_wrong, qkv

MIN = torch.finfo(torch.float32).min


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


def additive_mask(keys: int = 9) -> Tensor:
    return torch.where(torch.rand(2, 1, 6, keys) < 0.7, 0.0, MIN)


# --- what a mask is made of --------------------------------------------------------------------------


def test_a_mask_made_of_lengths(door: str) -> None:
    """Audio Flamingo 3, Pix2Struct, Llama 4: a sum over the padding says how long a row is."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        keep = torch.arange(9)[None, :] < padding.sum(-1, keepdim=True)
        return attend((q @ k.mT).masked_fill(~keep[:, None, None, :], MIN), v)

    padding = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    assert never_wrong(door, attention, *qkv(), padding).fused


def test_a_bias_gated_by_a_sum(door: str) -> None:
    """WavLM: the gate of a relative position is a sum over features."""

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, positions: Tensor) -> Tensor:
        return attend(q @ k.mT + torch.sigmoid(gates.sum(-1))[:, :, :, None] * positions, v)

    assert never_wrong(door, attention, *qkv(), torch.randn(2, 4, 6, 3), torch.randn(4, 6, 9)).fused


def test_a_bias_that_is_a_piece_of_a_product(door: str) -> None:
    """Funnel: one product scores both kinds of token, of which a choice is made for each pair."""

    def attention(q: Tensor, k: Tensor, v: Tensor, kinds: Tensor, same: Tensor) -> Tensor:
        other_kind, same_kind = torch.split(torch.einsum("bhmd,shd->bhms", q, kinds), 1, dim=-1)
        return attend(q @ k.mT + torch.where(same, same_kind, other_kind), v)

    args = (*qkv(), torch.randn(2, 4, 8), torch.rand(2, 1, 6, 9) < 0.5)
    assert never_wrong(door, attention, *args).fused


def test_a_bias_that_was_scaled_in_place(door: str) -> None:
    """Funnel: the positional part is multiplied in place before it is added."""

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        bias = torch.einsum("bhmd,nhd->bhmn", q, positions)
        bias *= keep
        return attend(q @ k.mT + bias, v)

    assert never_wrong(door, attention, *qkv(), torch.randn(9, 4, 8), torch.rand(6, 9)).fused


def test_a_mask_that_keeps_every_row_is_none() -> None:
    """transformers asks ``row >= 0`` where a mask has nothing to say of rows."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows, keys = torch.arange(q.size(-2))[:, None], torch.arange(k.size(-2))[None, :]
        keep = (rows >= 0) & (keys > -1) & padding[:, None, None, :]
        return attend(q @ k.mT + torch.where(keep, 0.0, MIN), v)

    (site,) = never_wrong("dynamo", attention, *qkv(), torch.tensor([[True] * 9, [True] * 5 + [False] * 4])).fused
    assert site.what == "padding"


# --- what is done with the scores ---------------------------------------------------------------------


def test_scores_bounded_by_a_constant_tensor(door: str) -> None:
    """XGLM: the sum of score and mask is kept finite by ``torch.max`` of two tensors."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT + mask
        return attend(torch.max(scores, torch.tensor(torch.finfo(torch.float32).min)), v)

    assert never_wrong(door, attention, *qkv(), additive_mask()).fused


def test_scores_filled_from_a_constant_tensor(door: str) -> None:
    """GPT-Neo, ImageGPT: the fill is a tensor that the model makes of a number."""

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT
        return attend(torch.where(keep, scores, torch.tensor(MIN, dtype=scores.dtype)), v)

    assert never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.7).fused


def test_a_mask_made_of_constant_tensors_is_a_predicate() -> None:
    """transformers 5.17 chooses between ``torch.tensor(0.0)`` and the least number, 5.23 between two numbers."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(6, 9, dtype=torch.bool).tril()
        kept = torch.tensor(0.0, device=q.device, dtype=q.dtype)
        return attend(q @ k.mT + torch.where(keep, kept, torch.finfo(torch.float32).min), v)

    (site,) = never_wrong("dynamo", attention, *qkv()).fused
    assert site.what == "causal"


def test_scores_shifted_in_another_unit(door: str) -> None:
    """LayoutLMv3 (CogView): the maximum is taken of the scores over 32 and the difference scaled back."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT + bias / 4 + mask) / 32
        return attend((scores - scores.amax(dim=-1).unsqueeze(-1)) * 32, v)

    assert never_wrong(door, attention, *qkv(), torch.randn(4, 6, 9), additive_mask()).fused


def test_scores_times_a_mask_of_floats(door: str) -> None:
    """OpenAI GPT: ``w * b - 1e4 * (1 - b)``, and a padding mask on top."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: Tensor, mask: Tensor) -> Tensor:
        return attend(q @ k.mT / 4 * causal + -1e4 * (1 - causal) + mask, v)

    assert never_wrong(door, attention, *qkv(), torch.ones(6, 9).tril(), additive_mask()).fused


def test_large_logits_may_leave_the_source_exact_by_luck(door: str) -> None:
    """Switch Transformers: two biases and no scale; the fused node adds the biases up first."""

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return attend(q @ k.mT + positions.permute(2, 0, 1) + mask, v)

    args = qkv(rows=16, keys=16, depth=16)
    assert never_wrong(door, attention, *args, torch.randn(16, 16, 4), additive_mask(16)[:, :, :1]).fused


# --- beside attention ---------------------------------------------------------------------------------


def test_a_quotient_of_sizes_is_no_tensor(door: str) -> None:
    """Longformer, LED: ``torch.div`` of two numbers stands in the graph."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks = torch.div(q.size(-2), 2, rounding_mode="trunc")
        return attend(q @ k.mT, v) * chunks

    assert never_wrong(door, attention, *qkv()).fused


def test_a_bias_of_products_on_products(door: str) -> None:
    """DeBERTa, SEW-D: positions score against keys and queries, each gathered by distance."""

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        scale = torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float) * 2)
        to_position = torch.gather(q @ positions.mT, -1, at.expand(2, 4, 6, 9))
        return attend(q @ (k / scale.to(k.dtype)).mT + to_position / scale.to(k.dtype), v)

    assert never_wrong(door, attention, *qkv(), torch.randn(4, 5, 8), torch.randint(0, 5, (6, 9))).fused


def test_two_attentions_share_the_sum_of_two_products(door: str) -> None:
    """LiLT: text and layout each score, and both attend by the sum of both scores."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        text, layout = q @ k.mT / 4, q[..., :2] @ k[..., :2].mT / 2
        of_text = torch.softmax(text + layout + mask, dim=-1) @ v
        return of_text, torch.softmax(layout + text + mask, dim=-1) @ v[..., :2]

    assert len(never_wrong(door, attention, *qkv(), additive_mask(), sites=2).fused) == 2


def test_shared_scores_that_somebody_else_sees_too(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = q @ k.mT
        return attend(scores, v), attend(scores / 2, v), scores.amax(-1)

    report = never_wrong(door, attention, *qkv(), sites=2)
    assert all("also used by" in site.reason for site in report.refused)
    assert not report.fused


def test_shared_scores_of_which_one_attention_is_refused(door: str) -> None:
    """What another attention uses is no reason to refuse only while that one is fused."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = q @ k.mT
        logs = torch.log_softmax(scores / 2, dim=-1)
        return attend(scores, v), logs.exp() @ v, logs

    report = never_wrong(door, attention, *qkv(), sites=2)
    assert not report.fused


def test_weights_that_are_skewed_are_refused_and_not_overlooked(door: str) -> None:
    """Longformer: scores are copied into a tensor of diagonals, and weights padded until they stand askew."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.new_zeros(2, 4, 6, 9)
        scores[..., :9] = q @ k.mT
        weights = torch.nn.functional.pad(torch.softmax(scores, dim=-1), (0, 1))[..., 1:]
        return weights @ v

    (site,) = never_wrong(door, attention, *qkv()).refused
    assert "the weights go through" in site.reason


def test_the_product_with_rows_of_its_own_is_the_score(door: str) -> None:
    """A gate of each key that is a projection of values (Doge) is a product too, but no row of queries is in it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
        gate = torch.exp(F.softplus(F.linear(v.transpose(1, 2).flatten(2), projection)))
        return attend(q @ k.mT * 0.5 + gate.mT[:, :, None, :], v)

    q, k, v = qkv()
    report = never_wrong(door, attention, q, k, v, torch.randn(v.shape[1], v.shape[1] * v.shape[3]) / 4)
    assert "0.5 * s + " in report.fused[0].spec
