"""Which programs a backward body runs, and whose gradient is that of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, isfinite

from attnfuse.derivative import pullback
from attnfuse.kernels.gluon.programs import mask_of
from attnfuse.kernels.rows import masking_fill, rows_kept
from attnfuse.kernels.triton import logit_of
from attnfuse.kernels.triton.plan import BackwardPlan
from attnfuse.score import Apply, Capture, Const, Expr, P, S, apply
from attnfuse.spec import AttentionSpec

__all__ = ["BodyPrograms", "body_programs"]

ZERO, ONE = Const(0.0), Const(1.0)


@dataclass(frozen=True)
class BodyPrograms:
    """``bare`` makes logits of scores, in units of ``exponent``; ``pulled`` maps a logit's gradient to its score's, but
    for ``factor``.

    Where ``mask`` is not None, it says which keys have a weight beside a band, so that tiles may be listed: ``score``
    is then the program of tiles that it cuts, and ``kept`` a number where the mask, beside a band that the body knows,
    keeps its key, and zero elsewhere. ``filled``: a key outside of the band may weigh something, so that its fill must
    be computed. ``unit`` is one of ``bare`` as a logit.
    """

    bare: Expr
    pulled: Expr
    score: Expr
    mask: Expr | None
    kept: Expr | None
    exponent: float
    factor: float
    unit: float
    filled: bool

    def summand(self, slot: int) -> bool:
        """Whether a capture is added to the scores, so that its gradient is what ``pulled`` maps to."""
        constant, rest = _apart(pullback(self.bare).get(Capture(slot), ZERO))
        return rest == self.pulled and isclose(constant * self.unit, 1.0, rel_tol=1e-6)


def body_programs(
    spec: AttentionSpec, plan: BackwardPlan, rows: int, keys: int, symbols: tuple[int, ...], *, listed: bool
) -> BodyPrograms:
    """The programs of a spec, whose facts ``plan`` has; ``listed`` says that tiles may be listed."""
    fill = masking_fill(spec)
    filled = plan.uncertain and fill is not None and fill > float("-inf")
    mask = mask_of(spec, banded=plan.left or plan.right) if listed and fill is not None else None
    bare = score = plan.masked_program if filled else plan.core_program
    # a fill of the program's own leaves the band to it
    whole = mask_of(spec, banded=False) if mask is not None and filled else mask
    if mask is not None:
        bare = logit_of(spec, rows_kept=rows_kept(spec, rows, keys, symbols)).bare
    constant, pulled = _apart(pullback(bare).get(S, ZERO))
    kept = None if whole is None else apply("where", whole, P, ZERO)
    return BodyPrograms(bare, pulled, score, mask, kept, plan.exponent, plan.factor * constant, plan.factor, filled)


def _apart(program: Expr) -> tuple[float, Expr]:
    """``(c, p)`` with ``program == c * p``: what multiplies every score's gradient can do so when they are summed."""
    match program:
        case Const(float() as value) if value and isfinite(value):
            return value, ONE
        case Apply("div", (inner, Const(float() as value))) if value and isfinite(value):
            constant, rest = _apart(inner)
            return constant / value, rest
        case Apply("mul", (left, right)):
            (first, left), (second, right) = _apart(left), _apart(right)
            rest = left if right == ONE else right if left == ONE else apply("mul", left, right)
            return first * second, rest
    return 1.0, program
