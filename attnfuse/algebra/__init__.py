"""The rules by which two spellings of one score program become the same program.

Each rule is a function from an expression to an equal one, or None where it does not apply; :data:`RULES`
is tried in order, innermost first, until nothing changes. "Equal" is meant for the arithmetic of
:mod:`attnfuse.score`: reassociating constants is allowed, losing a NaN, an infinity or a fully masked row is not.
The one stated exception is that a masked score contributes nothing even where it is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from attnfuse.algebra.kinds import Kind, Kinds, Rule, differentiated, kind
from attnfuse.algebra.masks import MASK_RULES
from attnfuse.algebra.numbers import NUMBER_RULES, named_softcap
from attnfuse.algebra.ranges import Bounds, bounds_of
from attnfuse.algebra.weights import WEIGHT_RULES
from attnfuse.score import Apply, Expr, rewrite

__all__ = [
    "RULES", "WEIGHT_RULES", "Bounds", "Kind", "Kinds", "Rule", "bounds_of", "differentiated", "kind", "normalise",
]  # fmt: skip

#: Every rule, in the order they are tried.
RULES: tuple[Rule, ...] = (*NUMBER_RULES, *MASK_RULES)

#: Rounds until a program is taken as it is; real ones settle in fewer than ten.
_PATIENCE = 64


def normalise(expr: Expr, kinds: Kinds, also: tuple[Rule, ...] = (), settled: set[Expr] | None = None) -> Expr:
    """The normal form of a program whose captures have the given kinds.

    ``also`` are further rules: :data:`WEIGHT_RULES` where the program's value is a weight, not a logit. ``settled``
    are programs that no rule changes, of the same captures; it is added to. A rule sees nothing of what is around the
    part that it rewrites, so that a program which grows step by step is rewritten in its new parts alone.
    """
    rules, known = (*RULES, *also), set() if settled is None else settled

    def step(part: Expr) -> Expr:
        found = _first(part, kinds, rules)
        if found is part and isinstance(part, Apply) and _is_settled(part, known):
            known.add(part)
        return found

    for _ in range(_PATIENCE):
        after = rewrite(expr, step, known)
        if after == expr:
            break
        expr = after
    return rewrite(expr, named_softcap, known)


def _is_settled(expr: Apply, known: AbstractSet[Expr]) -> bool:
    """Whether nothing changes a program that no rule changes at its top: all its parts are ``known``."""
    return named_softcap(expr) is expr and all(arg in known for arg in expr.args if isinstance(arg, Apply))


def _first(expr: Expr, kinds: Kinds, rules: tuple[Rule, ...]) -> Expr:
    if not isinstance(expr, Apply):
        return expr
    for rule in rules:
        found = rule(expr, kinds)
        if found is not None and found != expr:
            return found
    return expr
