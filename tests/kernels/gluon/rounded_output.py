"""What a backward cannot know better: its gradients are of weights and of an output that was rounded to a half type.

``delta``, the sum of ``grad_out * out`` of a row, is made of the rounded output in every backward that keeps no weights
(Dao 2023, https://arxiv.org/abs/2307.08691). The written-out program keeps its weights, so its gradients of logits sum
to zero in each row, and a tensor whose gradient sums very many of them, such as slopes, is more exact there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnfuse.reference import Scope, evaluate, repeat_heads
from tests.kernels.cases import Case

__all__ = ["left_by_rounding"]

DRAWS = 8


def left_by_rounding(given: Case, grad_out: Tensor) -> list[float]:
    """Of every float operand the most that an output rounded to ``given``'s type left in its gradient, of eight draws.

    Zero for query, key and value, whose gradients sum the logits' of one row or one key.
    """
    wide = given.to(torch.float64).leaves()
    logit, columns = _logits(wide)
    weight = torch.softmax(logit.detach(), dim=-1).nan_to_num()
    value, kept = repeat_heads(wide.value, wide.query.shape[-3]).detach(), weight[..., :columns]
    # of the output itself, and of the weights that it is a sum of
    parts = grad_out.double() * (kept @ value), kept * (grad_out.double() @ value.mT)
    variance = sum(part.square().sum(-1, keepdim=True) for part in parts)
    # a rounding is uniform within half a unit to either side
    deviation = torch.finfo(given.value.dtype).eps / 12**0.5 * torch.as_tensor(variance).sqrt()
    captures = [x for x in wide.captures if x.requires_grad]
    most = [0.0] * len(captures)
    for _ in range(DRAWS if logit.requires_grad else 0):
        left = weight * deviation * torch.randn_like(deviation)
        found = torch.autograd.grad(logit, captures, left, retain_graph=True, allow_unused=True)
        sizes = [0.0 if x is None else x.nan_to_num().abs().amax().item() for x in found]
        most = list(map(max, most, sizes))
    return [0.0, 0.0, 0.0, *most]


def _logits(wide: Case) -> tuple[Tensor, int]:
    """The logits, a sink's behind them, and how many are of keys."""
    scope = Scope.whole(wide.query, wide.key, wide.captures, ())
    score = wide.query @ repeat_heads(wide.key, wide.query.shape[-3]).mT
    logit = evaluate(wide.spec.score, replace(scope, score=score.detach())).expand(score.shape)
    if wide.spec.sink is not None:
        logit = torch.cat([logit, evaluate(wide.spec.sink, scope).expand(*logit.shape[:-1], 1)], dim=-1)
    return logit, score.shape[-1]
