"""ATen's scaled_dot_product_attention, where it computes exactly the spec.

Exactly means: the mask is none, top-left causal, or a captured additive bias. Any other mask would be
added to the scores, so that a NaN or infinite key behind it would reach the row; ``numerics="fast"``
allows that. A row that a bias masks with -inf throughout is zero in SDPA: where the spec wants NaN, as in
the written-out program, such rows are found in the bias and made NaN again. So are rows without a mask of which
every score is NaN, which ATen's CPU kernel makes zero where there are few keys. The backward of ATen's CPU
kernel normalises by ``exp(s - lse)``, which is wrong on rows of one huge negative bias: with a bias ours
takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.errors import BadProgram
from attnfuse.form import ABSORBING, Form, form_of
from attnfuse.kernels.cpu import cost
from attnfuse.kernels.cpu.batches import for_flash, four_d, gradients
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.prices import factor
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel, lookup
from attnfuse.kernels.rows import band_of, rows_kept
from attnfuse.operands import Operands
from attnfuse.reference import Scope, attention, evaluate, repeat_heads
from attnfuse.score import Const, Expr, P, apply, text
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Sdpa", "is_causal", "scale_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@kernel
class Sdpa(Kernel):
    """One call of ATen's kernel; its fast path on CPU is flash attention over 4-D operands."""

    name: ClassVar[str] = "sdpa"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    portable: ClassVar[bool] = True
    gives_lse: ClassVar[bool] = True
    saves_lse: ClassVar[bool] = True
    zeroes_empty_rows: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What SDPA cannot say, or says with another meaning."""
        return (*_cannot_say(problem.spec), *_means_otherwise(problem), *self.slow_path(problem))

    def slow_path(self, problem: Problem) -> tuple[str, ...]:
        """Where ATen falls back to the written-out program."""
        return _slow_path(problem)

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.cpu.cost`; ATen's fast path takes operands whose columns are contiguous."""
        return cost.sdpa(problem, called=not self.inlines(problem)) * factor(self.name, problem, target)

    def inlines(self, problem: Problem) -> bool:
        """Where the call is all there is to it: compilers know it, and lay out what is around it."""
        known = problem.compiled and not problem.dynamic and not problem.autocast
        return known and not _mask_of(problem.spec)

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        out, mask = _called(spec, operands)
        # a row that keeps nothing does not keep the first key, and one key is looked at sooner than all
        if mask is None or not bool(mask[..., 0].isneginf().any()):
            return out
        return _emptied(out, mask)

    def expand(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """The same, every key looked at."""
        out, mask = _called(spec, operands)
        return out if mask is None else _emptied(out, mask)

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``, of plain and causal attention; any other is computed without SDPA."""
        if _mask_of(spec) or operands.empty:
            return lookup("blocked").run_with_lse(spec, operands)
        query, key = operands.query, operands.key
        out, lse = _flash(spec, operands)
        batch = query.shape[:-3]
        out, lse = out.view(*batch, *out.shape[-3:]), lse.reshape(query.shape[:-1]).to(torch.float32)
        if _has_many(key):
            return out, lse
        lost = _nan_rows(query, key)
        return torch.where(lost.unsqueeze(-1), float("nan"), out), lse.masked_fill(lost, float("nan"))

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """ATen's flash backward of plain and causal attention, and the blocked kernel's of any other."""
        if residual.grad_lse is not None or _mask_of(spec) or operands.empty:
            return lookup("blocked").backward(spec, grad_out, operands, needs, residual)
        query = operands.query
        batch = query.shape[:-3]
        if residual.lse is None or query.dtype == torch.float64:  # our lse is float32
            out, lse = _flash(spec, operands)
        else:
            out, lse = four_d(residual.out, batch), residual.lse.reshape(-1, *residual.lse.shape[-2:])
        grads = _flash_backward(
            for_flash(grad_out, batch), *_for_flash(operands), out, lse, 0.0, is_causal(spec), scale=scale_of(spec)
        )
        return gradients(grads, operands, needs)


def _called(spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """What SDPA makes of the operands, and the mask of which it may have emptied rows."""
    if operands.empty:
        return attention(spec, operands)[0], None
    causal, query, key = is_causal(spec), operands.query, operands.key
    mask = None if causal else _mask(_form(spec), operands)
    batch = query.shape[:-3]
    out = F.scaled_dot_product_attention(
        four_d(query, batch),
        four_d(key, batch),
        four_d(operands.value, batch),
        attn_mask=None if mask is None else four_d(mask, batch),
        is_causal=causal,
        scale=scale_of(spec),
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    out = out.view(*batch, *out.shape[-3:])
    if mask is None and not _has_many(key):
        return torch.where(_nan_rows(query, key).unsqueeze(-1), float("nan"), out), None
    kept = spec.empty_rows == "zero" or rows_kept(spec, query.shape[-2], key.shape[-2], operands.symbols)
    return out, None if kept else mask


def _emptied(out: Tensor, mask: Tensor) -> Tensor:
    """``out`` with NaN in the rows that a mask leaves nothing of."""
    return torch.where(mask.amax(dim=-1, keepdim=True).isneginf(), float("nan"), out)


_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash(spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
    """ATen's own ``out [B, H, M, D]`` and ``lse [B, H, M]``, which SDPA keeps to itself."""
    out, lse = _flash_forward(*_for_flash(operands), 0.0, is_causal(spec), scale=scale_of(spec))
    return out, lse


def _for_flash(operands: Operands) -> tuple[Tensor, ...]:
    """Query, key and value as ATen's flash attention takes them, heads repeated."""
    *batch, heads = operands.query.shape[:-2]
    return tuple(for_flash(repeat_heads(x, heads), batch) for x in operands.qkv)


# --- what it refuses --------------------------------------------------------------------------------


def _cannot_say(spec: AttentionSpec) -> tuple[str, ...]:
    form = form_of(spec.score)
    reasons = [
        (form is None, f"SDPA has no score program such as {text(spec.score)}"),
        (form is not None and form.softcap is not None, "SDPA has no softcap"),
        (form is not None and not _is_number(form.scale), "SDPA's scale is a positive number, not a tensor"),
        (spec.weight != P, "SDPA has no weight program"),
        (spec.sink is not None, "SDPA has no sinks"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


def _means_otherwise(problem: Problem) -> tuple[str, ...]:
    spec = problem.spec
    form = form_of(spec.score)
    if form is None or not form.keep or (is_causal(spec) and not form.bias):
        return ()
    if problem.numerics == "fast":
        return ()
    return ("a mask other than top-left causal is added to the scores, which lets NaN and infinite keys through",)


def _slow_path(problem: Problem) -> tuple[str, ...]:
    dtypes = set(problem.dtypes)
    reasons = [
        (problem.spec.dropout > 0, "ATen's CPU kernel has no dropout"),
        (problem.query.shape[-1] != problem.value.shape[-1], "ATen's CPU kernel needs value as wide as query"),
        (len(dtypes) > 1 or not dtypes <= set(DTYPES), "ATen's CPU kernel needs operands of one floating dtype"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


# --- how it says the spec ---------------------------------------------------------------------------


def _form(spec: AttentionSpec) -> Form:
    form = form_of(spec.score)
    if form is None:
        raise BadProgram(f"sdpa was asked for a program it refuses: {text(spec.score)}")
    return form


def _is_number(scale: Expr) -> bool:
    return isinstance(scale, Const) and scale.value > 0


def scale_of(spec: AttentionSpec) -> float:
    """The factor on the scores, a number."""
    form = _form(spec)
    if not isinstance(form.scale, Const):
        raise BadProgram(f"sdpa was asked for a scale it refuses: {text(form.scale)}")
    return float(form.scale.value)


def _mask_of(spec: AttentionSpec) -> bool:
    """Whether SDPA is given a mask as a tensor."""
    form = _form(spec)
    return bool(form.bias or form.keep) and not is_causal(spec)


def is_causal(spec: AttentionSpec) -> bool:
    """Whether the mask is ``n <= m`` and nothing else: every row keeps key 0, so its fill is never seen."""
    form = form_of(spec.score)
    band = band_of(spec)
    certain = form is not None and not form.bias and form.fill <= ABSORBING
    return certain and band.exact and (band.left, band.right) == (None, 0)


def _mask(form: Form, operands: Operands) -> Tensor | None:
    """Biases and masks as one additive tensor that broadcasts against the scores."""
    masks = [apply("where", conjunct, Const(0.0), Const(form.fill)) for conjunct in form.keep]
    scope = Scope.whole(operands)
    found: Tensor | None = None
    for part in (*form.bias, *masks):
        value = evaluate(part, scope).to(scope.dtype)
        found = value if found is None else found + value
    # a constant that is added has no dimensions yet
    return None if found is None else found.reshape(*[1] * (operands.query.dim() - found.dim()), *found.shape)


#: A vector register holds no more numbers. ATen's maximum of a row forgets NaN in what does not fill one.
_LANES = 16


def _has_many(key: Tensor) -> bool:
    """Whether there are surely more keys than ATen handles apart from the others."""
    keys: object = key.shape[-2]  # a symbol while a program for any length is traced
    return isinstance(keys, int) and keys >= _LANES


def _nan_rows(query: Tensor, key: Tensor) -> Tensor:
    """Which rows ``[*B, H, M]`` have a score of NaN with the first key, which every row keeps: they are NaN."""
    first = repeat_heads(key[..., :1, :], query.shape[-3])
    wide = torch.promote_types(query.dtype, torch.float32)  # a half type may overflow where the product does not
    return (query.to(wide) * first.to(wide)).sum(-1).isnan()
