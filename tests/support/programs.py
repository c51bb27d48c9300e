"""Random score programs: syntactically right, meaning nothing in particular."""

from __future__ import annotations

from hypothesis import strategies as st

from attnfuse.score import ARITY, Apply, Capture, Const, Expr, Index, P, S, Symbol

__all__ = ["constants", "programs"]

_INDICES = tuple(map(Index, ("b0", "b1", "h", "m", "n")))


def constants() -> st.SearchStrategy[Const]:
    """Booleans, integers of 64 bits, and every float there is."""
    return st.builds(Const, st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats()))


def programs(
    *, score: bool = True, indices: tuple[Index, ...] = _INDICES, captures: int = 3, symbols: int = 3, leaves: int = 12
) -> st.SearchStrategy[Expr]:
    """Programs over ``s`` and ``p`` (if ``score``), these indices, and this many captures and sizes."""
    variables: list[Expr] = [S, P] if score else []
    variables += [*indices, *map(Capture, range(captures)), *map(Symbol, range(symbols))]
    leaf = st.one_of(*([st.sampled_from(variables)] if variables else []), constants())
    return st.recursive(leaf, _applications, max_leaves=leaves)


def _applications(arguments: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.sampled_from(sorted(ARITY)).flatmap(
        lambda op: st.builds(Apply, st.just(op), st.tuples(*[arguments] * ARITY[op]))
    )
