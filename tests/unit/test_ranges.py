"""What ranges say of masks, against every score of many small tiles."""

from __future__ import annotations

import itertools
import random

import pytest

from attnfuse.algebra import bounds_of
from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol, parse, text

MASKS = (
    "t0 == t1", "t0 != t1", "(n <= m) & (t0 == t1)", "(n <= m) | (n < 3)", "m // 2 == n // 2", "t2", "~t2 & (n < 4)",
    "n - m < 2", "m - 2 * n >= -3", "min(m, n) < 2", "max(t0, n) > 2", "-m <= n - 4", "n <= m + z0", "(t0 < 2) | t2",
    "True", "t2 & False", "t2 | True", "~(t0 == 1)",
)  # fmt: skip
UNKNOWN = ("m % 2 == 0", "(n * n) < 4", "t0 ^ t2", "1.5 * m < n")


def value(expr: Expr, names: dict[str, int]) -> int:
    return int(eval(text(expr).replace("~", "1-"), {"min": min, "max": max, **names}))


def ranges(variable: Capture | Index | Symbol) -> tuple[Expr, Expr]:
    places = {"t0": 0, "t1": 2, "t2": 4, "m": 6, "n": 8}
    if isinstance(variable, Symbol):
        return variable, variable
    place = places[text(variable)] + 1
    return Symbol(place), Symbol(place + 1)


def tiles(seed: int) -> dict[str, tuple[int, int]]:
    drawn = random.Random(seed)
    ends = {name: sorted(drawn.choices(range(6), k=2)) for name in ("t0", "t1", "m", "n")}
    ends["t2"] = sorted(drawn.choices((0, 1), k=2))
    return {name: (low, high) for name, (low, high) in ends.items()}


@pytest.mark.parametrize("mask", [*MASKS, *UNKNOWN])
def test_never_wrong(mask: str) -> None:
    found = bounds_of(parse(mask), ranges)
    for seed in range(60):
        tile, names = tiles(seed), {"z0": seed % 3}
        ends = [end for name in ("t0", "t1", "t2", "m", "n") for end in tile[name]]
        given = {**names, **{f"z{place + 1}": end for place, end in enumerate(ends)}}
        inside = [range(low, high + 1) for low, high in tile.values()]
        kept = [
            value(parse(mask), {**names, **dict(zip(tile, at, strict=True))}) & 1 for at in itertools.product(*inside)
        ]
        assert not any(kept) or value(found.some, given) & 1
        assert all(kept) or not value(found.every, given) & 1


def test_documents_are_told_apart() -> None:
    found = bounds_of(parse("t0 == t1"), ranges)
    names = dict.fromkeys(("z5", "z6", "z7", "z8", "z9", "z10"), 0)
    assert not value(found.some, {**names, "z1": 2, "z2": 3, "z3": 4, "z4": 4})
    assert value(found.some, {**names, "z1": 2, "z2": 3, "z3": 3, "z4": 4})
    assert value(found.every, {**names, "z1": 3, "z2": 3, "z3": 3, "z4": 3})
    assert not value(found.every, {**names, "z1": 3, "z2": 4, "z3": 3, "z4": 4})


@pytest.mark.parametrize("mask", UNKNOWN)
def test_what_is_not_understood_is_cut(mask: str) -> None:
    found = bounds_of(parse(mask), ranges)
    assert (found.some, found.every) == (Const(True), Const(False))
    beside = bounds_of(Apply("and", (parse("n <= m"), parse(mask))), ranges)
    assert beside.every == Const(False)
    assert beside.some != Const(True)
