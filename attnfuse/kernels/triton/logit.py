"""A score program taken apart for an online softmax: a factor that ``exp2`` absorbs, and the program inside the mask.

The softmax of ``factor * u`` needs one multiply-add for each score, ``exp2(u * F - max(u) * F)`` with ``F = factor *
log2(e)``, however the program scales: ``where(n <= m, 0.125 * s, -inf)`` is ``0.125 * where(n <= m, s, -inf)``,
``50 * tanh(0.02 * s)`` is ``50 * u`` with ``u = tanh(0.02 * s)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from attnfuse.form import ABSORBING, masked_by
from attnfuse.kernels.rows import FILL, beside_band
from attnfuse.score import Apply, Capture, Const, Expr, apply, reads_score, rewrite, walk
from attnfuse.spec import AttentionSpec, Captured, axes_of

__all__ = ["LOG2E", "Logit", "logit_of"]

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Logit:
    """``logit == factor * masked``, ``== factor * core`` for keys inside of the mask's band, and ``== factor * bare``
    for keys that the whole mask keeps.

    ``factor > 0``. ``huge`` says that a row's maximum may be as far below zero as floats go (a mask of finfo.min, in
    a row that it masks throughout), where products with a factor overflow or round apart: subtract it first.
    """

    factor: float
    masked: Expr
    core: Expr
    bare: Expr
    huge: bool

    @property
    def exponent(self) -> float:
        """What multiplies ``masked`` to make it a power of two."""
        return self.factor * LOG2E

    def shrunk(self, program: Expr, captures: tuple[Captured, ...]) -> Expr:
        """Another logit, a sink's, in the units of ``masked``."""
        return _shrunk(program, self.factor, captures)


@lru_cache(maxsize=1024)
def logit_of(spec: AttentionSpec, *, rows_kept: bool = False) -> Logit:
    """The score program of a spec, taken apart; ``rows_kept`` says that every row is proven to keep a key."""
    mask = masked_by(spec)
    if rows_kept and mask is not None and mask.fill <= ABSORBING:
        # nobody sees the fill: but for tiles in which a row keeps nothing, whose maximum it would be for a while
        spec = replace(spec, score=replace(mask, fill=float("-inf"), added=False).expr())
    programs = (spec.score, _inside(spec), _unmasked(spec))
    masked, core, bare = (rewrite(program, _one_constant) for program in programs)
    if _may_be_huge(spec):
        return Logit(1.0, masked, core, bare, huge=True)
    # a mask is outermost and its fill no factor, so the program without its mask scales alike, if it is spelt alike
    by_factor = [_factored(each, spec.captures) for each in (masked, core, bare)]
    if len({factor for factor, _ in by_factor}) > 1:
        return Logit(1.0, masked, core, bare, huge=False)
    (factor, masked), (_, core), (_, bare) = by_factor
    return Logit(factor, masked, core, bare, huge=False)


def _inside(spec: AttentionSpec) -> Expr:
    """The program of a key that the mask's band keeps: without the conjuncts that are the band."""
    mask = masked_by(spec)
    return spec.score if mask is None else replace(mask, keep=beside_band(mask, spec.captures)).expr()


def _unmasked(spec: AttentionSpec) -> Expr:
    """The program of a key that the whole mask keeps."""
    mask = masked_by(spec)
    return spec.score if mask is None else mask.inside


def _one_constant(part: Expr) -> Expr:
    """``a * x / b`` as ``(a / b) * x``: a softcap's division is a multiplication it has already."""
    match part:
        case Apply("div", (Apply("mul", (Const(float() as a), x)), Const(float() as b))) if b:
            return apply("mul", Const(a / b), x)
    return part


def _may_be_huge(spec: AttentionSpec) -> bool:
    """Whether it fills, or reads floats for each key or adds others, which may hold the least finite one to mask it."""
    constants = [part.value for part in walk(spec.score) if isinstance(part, Const)]
    if any(math.isfinite(value) and value <= FILL for value in constants):
        return True
    read = {part.slot for part in walk(spec.score) if isinstance(part, Capture)}
    masking = {slot for slot in read if "n" in spec.captures[slot].axes} | set(_added(spec.score))
    return any(spec.captures[slot].dtype in ("float32", "bfloat16", "float64") for slot in masking)


def _added(program: Expr) -> Iterator[int]:
    """The slots of captures that are added to a score as they are, or to a constant part of themselves."""
    match program:
        case Capture(slot):
            yield slot
        case Apply("add", (a, b)) | Apply("where", (_, a, b)):
            yield from (*_added(a), *_added(b))
        case Apply("mul", (Const(), x)):
            yield from _added(x)


# --- factors ----------------------------------------------------------------------------------------

Captures = tuple[Captured, ...]


def _factored(program: Expr, captures: Captures) -> tuple[float, Expr]:
    """``(f, u)`` with ``program == f * u`` and ``f > 0``; ``f == 1.0`` where nothing can be taken out."""
    match program:
        case Apply("mul", (Const(float() as value), inner)) | Apply("mul", (inner, Const(float() as value))):
            factor, inside = _factored(inner, captures)
            return _signed(factor * value, inside, program)
        case Apply("div", (inner, Const(float() as value))) if value:
            factor, inside = _factored(inner, captures)
            return _signed(factor / value, inside, program)
        case Apply("add", (inner, summand)) if reads_score(inner) and not reads_score(summand):
            factor, inside = _factored(inner, captures)
            return factor, apply("add", inside, _shrunk(summand, factor, captures))
        case Apply("where", (mask, inner, Const(fill))) if reads_score(inner):
            factor, inside = _factored(inner, captures)
            return factor, apply("where", mask, inside, _shrunk(Const(float(fill)), factor, captures))
    return 1.0, program


def _signed(factor: float, inside: Expr, program: Expr) -> tuple[float, Expr]:
    # beyond these a score or a fill could overflow that did not
    if not 2**-20 < abs(factor) < 2**20:
        return 1.0, program
    return (factor, inside) if factor > 0 else (-factor, apply("neg", inside))


def _shrunk(program: Expr, factor: float, captures: Captures) -> Expr:
    """``program / factor``, the division carried to where the fewest elements are divided."""
    if factor == 1.0:
        return program
    match program:
        case Const(value):
            return Const(float(value) / factor)
        case Apply("where", (mask, kept, Const() as other)):
            return apply("where", mask, *(_shrunk(arm, factor, captures) for arm in (kept, other)))
        case Apply("mul", (left, right)) if len(axes_of(left, captures)) <= len(axes_of(right, captures)):
            return apply("mul", _shrunk(left, factor, captures), right)
        case Apply("mul", (left, right)):
            return apply("mul", left, _shrunk(right, factor, captures))
    return apply("mul", Const(1.0 / factor), program)
