"""Rules for programs whose value is a weight, since nothing normalises it: zero masks."""

from __future__ import annotations

from attnfuse.algebra.kinds import Kinds, Rule
from attnfuse.score import Apply, Const, Expr, apply, reads_score

__all__ = ["WEIGHT_RULES"]


def _masked_product(expr: Expr, _: Kinds) -> Expr | None:
    """``x * where(keep, y, 0) -> where(keep, x * y, 0)``: a masked weight is zero even where the score is NaN."""
    match expr:
        case Apply("mul", (x, Apply("where", (keep, y, Const(0.0))))) if reads_score(x) and not reads_score(keep):
            return apply("where", keep, apply("mul", x, y), Const(0.0))
        case Apply("mul", (Apply("where", (keep, y, Const(0.0))), x)) if not reads_score(keep):
            return apply("where", keep, apply("mul", y, x), Const(0.0))
        case Apply("div", (Apply("where", (keep, x, Const(0.0))), y)) if not (reads_score(keep) or reads_score(y)):
            return apply("where", keep, apply("div", x, y), Const(0.0))
    return None


#: In the order they are tried, after all others.
WEIGHT_RULES: tuple[Rule, ...] = (_masked_product,)
