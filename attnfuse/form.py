"""The shape that most score programs have: a scale, a softcap, biases, a mask and its fill.

The canonical program is ``where(keep, softcap(scale * s) + bias, fill)``, or for a finite fill that the source
adds, ``softcap(scale * s) + bias + where(keep, 0.0, fill)``; :class:`Form` is that shape as data. The two have the
same value, but in a row that keeps nothing only the second has a gradient. Most attention has a form; a program
without one is still attention, only unnamed. ``form_of(form.expr()) == form`` for every form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from attnfuse.score import Apply, Const, Expr, P, Prob, S, Score, apply, joined, parted, reads_score, walk
from attnfuse.spec import AttentionSpec

__all__ = ["ABSORBING", "Form", "Mask", "form_of", "masked_by", "weight_factor"]

ONE = Const(1.0)

#: A finite fill at or below this swallows any score it is added to: float32 has 24 bits, so every
#: score smaller than 5e22 in magnitude disappears in the sum. ``-1e9`` and ``-1e4`` do not.
ABSORBING = -1e30


@dataclass(frozen=True)
class Form:
    """``where(keep, softcap(scale * s) + bias, fill)``, each part optional; the mask is a summand where ``added``.

    ``scale`` is a number or a program free of ``s`` (a captured scale); ``softcap`` is the cap ``c`` of
    ``c * tanh(x / c)``; ``bias`` are the summands added after it; ``keep`` are the conjuncts of the mask
    (empty: every key is kept) and ``fill`` the logit of a key that is not kept. An ``added`` fill is at most
    :data:`ABSORBING`; a higher one does not replace the score and counts as a bias.
    """

    scale: Expr = ONE
    softcap: float | None = None
    bias: tuple[Expr, ...] = ()
    keep: tuple[Expr, ...] = ()
    fill: float = float("-inf")
    added: bool = False

    def expr(self) -> Expr:
        """The program, in the spelling that simplify brings every program to."""
        out = _scaled(self.scale)
        if self.softcap is not None:
            cap = Const(self.softcap)
            out = apply("mul", cap, apply("tanh", apply("div", out, cap)))
        for summand in self.bias:
            out = apply("add", out, summand)
        return _masked(out, self.keep, self.fill, added=self.added)


def _masked(inside: Expr, keep: tuple[Expr, ...], fill: float, *, added: bool) -> Expr:
    if not keep:
        return inside
    mask = joined("and", keep)
    if added:
        return apply("add", inside, apply("where", mask, Const(0.0), Const(fill)))
    return apply("where", mask, inside, Const(fill))


def _scaled(scale: Expr) -> Expr:
    """A score times a scale, whose number stands first."""
    if scale == ONE:
        return S
    match scale:
        case Apply("mul", (Const() as number, captured)):
            return apply("mul", number, apply("mul", captured, S))
    return apply("mul", scale, S)


@lru_cache(maxsize=1024)
def form_of(score: Expr) -> Form | None:
    """The form of a canonical score program; None when it has none."""
    keep: tuple[Expr, ...] = ()
    fill, added = float("-inf"), False
    match score:
        case Apply("where", (mask, inner, Const(value))) if not reads_score(mask):
            keep, fill, score = tuple(parted("and", mask)), float(value), inner
        case Apply("add", (inner, Apply("where", (mask, Const(0.0), Const(value))))) if value <= ABSORBING:
            keep, fill, score, added = tuple(parted("and", mask)), float(value), inner, True
    bias, score = _split_bias(score)
    softcap: float | None = None
    match score:
        case Apply("mul", (Const(cap), Apply("tanh", (Apply("div", (inner, Const(divisor))),)))) if cap == divisor:
            softcap, score = float(cap), inner
    match score:
        case Score():
            return Form(ONE, softcap, bias, keep, fill, added)
        case Apply("mul", (Const() as number, Apply("mul", (scale, Score())))) if not reads_score(scale):
            return Form(apply("mul", number, scale), softcap, bias, keep, fill, added)
        case Apply("mul", (scale, Score())) if not reads_score(scale):
            return Form(scale, softcap, bias, keep, fill, added)
    return None


@dataclass(frozen=True)
class Mask:
    """The conjuncts that a key must meet to be kept, the logit that it has elsewhere, and the program of kept keys.

    Of programs that have no form too. The mask is a summand where ``added``.
    """

    keep: tuple[Expr, ...]
    fill: float
    inside: Expr
    added: bool = False

    def expr(self) -> Expr:
        """The whole program; without conjuncts that of kept keys."""
        return _masked(self.inside, self.keep, self.fill, added=self.added)


def masked_by(spec: AttentionSpec) -> Mask | None:
    """The mask of a spec, whatever its program does with the keys that are kept; None when it has none.

    Without a softmax only a key of weight zero is masked.
    """
    match spec.score:
        case Apply("where", (mask, inside, Const(value))) if not reads_score(mask):
            if spec.normaliser == "none" and (value != 0 or spec.weight != P):
                return None
            return Mask(tuple(parted("and", mask)), float(value), inside)
    form = form_of(spec.score)
    if form is None or not form.keep:
        return None
    return Mask(form.keep, form.fill, replace(form, keep=()).expr(), form.added)


def weight_factor(weight: Expr) -> Expr | None:
    """What a weight program multiplies a weight by; None where it does something else."""
    match weight:
        case Prob():
            return Const(1.0)
        case Apply("mul", (left, right)):
            factor, rest = (right, left) if P in walk(left) else (left, right)
            inner = weight_factor(rest)
            if inner is None or P in walk(factor):
                return None
            return factor if inner == Const(1.0) else apply("mul", factor, inner)
    return None


def _split_bias(score: Expr) -> tuple[tuple[Expr, ...], Expr]:
    match score:
        case Apply("add", (inner, summand)) if not reads_score(summand):
            outer, base = _split_bias(inner)
            return (*outer, summand), base
    return (), score
