"""A score program as flex_attention takes it: a scale, what is left of the program, and the mask by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from attnfuse.form import ABSORBING, Form, form_of
from attnfuse.kernels.cpu.call import scaled
from attnfuse.kernels.rows import Band, band_of, rows_kept
from attnfuse.score import Apply, Capture, Const, Expr, Index, joined, walk
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["Split", "never_empty", "split"]

ALWAYS, OPEN = Const(True), Band()
#: Operations whose result is not finite where an argument is not.
_RING = ("add", "sub", "mul", "neg", "float")


@dataclass(frozen=True)
class Split:
    """``where(keep, score(scale * s), -inf)``.

    ``band`` holds every key that ``keep`` keeps; ``trusted`` are captures that the proof of :func:`never_empty` takes
    to be finite.
    """

    scale: float
    score: Expr
    keep: Expr = ALWAYS
    band: Band = OPEN
    trusted: frozenset[int] = frozenset()


@lru_cache(maxsize=1024)
def split(spec: AttentionSpec, rows: int, keys: int) -> Split:
    """The parts of a spec's score program at these sizes.

    A mask whose fill is not -inf stays in the program where a row may keep nothing: it then weighs all keys equally.
    """
    form = form_of(spec.score)
    if form is None:
        return Split(*scaled(spec.score))
    trusted = frozenset(
        part.slot
        for summand in _unbounded(form)
        for part in walk(summand)
        if isinstance(part, Capture) and "n" not in spec.captures[part.slot].axes
    )
    if not form.keep or not _is_absent(spec, form, rows, keys):
        return Split(*scaled(spec.score), trusted=trusted)
    kept = replace(form, keep=(), added=False).expr()
    return Split(*scaled(kept), joined("and", form.keep), band_of(spec), trusted)


def never_empty(spec: AttentionSpec, rows: int, keys: int) -> bool:
    """Whether in every row some logit is above -inf, or all are NaN, when no captured tensor varies along the keys.

    A polynomial of finite numbers is finite, and one that reads a number that is not is not finite either.
    """
    form = form_of(spec.score)
    if form is None or not all(_is_polynomial(summand, spec.captures) for summand in _unbounded(form)):
        return False
    return bool(form.keep and form.fill > float("-inf")) or _mask_keeps(spec, form, rows, keys)


def _is_absent(spec: AttentionSpec, form: Form, rows: int, keys: int) -> bool:
    """Whether a masked key has weight zero in every row that is not masked throughout, or there is no such row."""
    return form.fill == float("-inf") or (form.fill <= ABSORBING and _mask_keeps(spec, form, rows, keys))


def _mask_keeps(spec: AttentionSpec, form: Form, rows: int, keys: int) -> bool:
    bare = replace(form, scale=Const(1.0), softcap=None, bias=())
    return rows_kept(replace(spec, score=bare.expr()), rows, keys)


def _unbounded(form: Form) -> tuple[Expr, ...]:
    """The parts of a form that can make a logit infinite: a scale inside a softcap cannot."""
    return form.bias if form.softcap is not None else (form.scale, *form.bias)


def _is_polynomial(program: Expr, captures: tuple[Captured, ...]) -> bool:
    match program:
        case Const(value):
            return math.isfinite(value)
        case Capture(slot):
            return "n" not in captures[slot].axes
        case Apply("div", (inner, Const(divisor))):
            return divisor != 0 and _is_polynomial(inner, captures)
        case Apply(op, args):
            return op in _RING and all(_is_polynomial(arg, captures) for arg in args)
    return isinstance(program, Index)
