"""Random recipes, random spellings of them, and a sweep that uses each word of the vocabulary once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st

from tests.property import recipe as parts
from tests.property.menu import AXES, Spelling, options, plainest, term_options
from tests.property.recipe import WEIGHTS, Part, Recipe, Sizes
from tests.property.vocabulary import UNREAD

__all__ = ["recipes", "sizes", "spellings", "sweep"]

_BIASES = (
    parts.bias("b", "h", "m", "n"),
    parts.bias("h", "m", "n"),
    parts.bias("m", "n"),
    parts.bias("b", "n"),
    parts.alibi_keys(),
    parts.alibi_distance(),
)
_CAPTURED_MASKS = (
    parts.padding(),
    parts.padding("int64"),
    parts.allowed("m", "n"),
    parts.allowed("b", "m", "n"),
    parts.allowed("b", "h", "m", "n"),
    parts.document(),
)
_FILLS = (float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4)

#: Sizes that no two axes share, so that a mixed-up axis is seen.
DISTINCT = Sizes(batch=(2,), heads=4, kv_heads=4, rows=5, keys=7, depth=8, value_depth=6)


@lru_cache(maxsize=None, typed=True)
def _among(*choices: Any) -> st.SearchStrategy[Any]:
    """One of the choices; a new strategy is examined anew whenever it is drawn from."""
    return st.sampled_from(choices)


def _one_batch(part: Part) -> bool:
    """Whether a part can be spelled with two batch dimensions."""
    return part.word.endswith(("mn", "keys", "distance", "causal", "window", "padding_bool"))


@st.composite
def sizes(draw: st.DrawFn, zero: bool = False) -> Sizes:
    """Ones, primes, rows unlike keys, grouped heads; with ``zero``, sometimes an empty dimension."""
    length = _among(0, 1, 2, 3, 7, 11, 16, 17) if zero else _among(1, 2, 3, 7, 11, 16, 17)
    kv_heads = draw(_among(1, 2, 3))
    return Sizes(
        batch=draw(_among((1,), (2,), (3,), (2, 3))),
        heads=kv_heads * draw(_among(1, 1, 2, 3)),
        kv_heads=kv_heads,
        rows=draw(length),
        keys=draw(length),
        depth=draw(_among(1, 5, 8, 16)),
        value_depth=draw(_among(1, 6, 8, 16)),
    )


@st.composite
def recipes(draw: st.DrawFn, shapes: st.SearchStrategy[Sizes] | None = None) -> Recipe:
    """A random attention; without ``shapes`` one whose every axis has its own size."""
    shape = _distinct(draw) if shapes is None else draw(shapes)
    one_batch = len(shape.batch) == 1
    biases = [part for part in _BIASES if one_batch or _one_batch(part)]
    masks = [part for part in _CAPTURED_MASKS if one_batch or _one_batch(part)]
    offsets = _among(0, 1, -1, 3, shape.keys - shape.rows)
    chosen = (
        draw(st.booleans()) and parts.causal(draw(offsets)),
        draw(st.booleans()) and parts.window(draw(offsets) - draw(st.integers(1, 4))),
        draw(st.booleans()) and draw(_among(*masks)),
    )
    weights = draw(_among("softmax", *WEIGHTS))
    fill = draw(_among(*_FILLS if weights == "softmax" else _FILLS[:1]))
    return Recipe(
        sizes=shape,
        scale=draw(_among(None, 0.125, 0.3, 2.0, -0.5, "temperature")),
        softcap=draw(_among(None, None, 30.0, 2.5)),
        biases=tuple(draw(st.lists(_among(*biases), max_size=1))),
        masks=tuple(part for part in chosen if part),
        fill=fill,
        added=fill != float("-inf") and draw(st.booleans()),
        sink=weights == "softmax" and draw(_among(False, False, True)),
        weights=weights,
    )


def _distinct(draw: st.DrawFn) -> Sizes:
    grouped = draw(st.booleans())
    batch = draw(_among((2,), (2,), (3, 2)))
    return replace(DISTINCT, batch=batch, kv_heads=2 if grouped else 4)


@st.composite
def spellings(draw: st.DrawFn, recipe: Recipe, unread: bool = True) -> Spelling:
    """A random spelling that fits ``recipe``; without ``unread``, only of words that attnfuse reads."""
    chosen = Spelling()
    for axis in AXES:
        fits = [word for word in options(recipe, chosen, axis) if unread or word not in UNREAD.get(axis, ())]
        chosen = chosen.saying(axis, draw(_among(*fits)))
    return replace(chosen, terms=tuple(draw(_among(*term_options(recipe, chosen, part))) for part in recipe))


def sweep() -> Iterator[tuple[str, Recipe, Spelling]]:
    """Every word of the vocabulary in an otherwise plain spelling, with a name for the test's id."""
    seen: set[str] = set()
    for recipe in _SAMPLES:
        for name, spelling in (*_one_step_from(recipe, plainest(recipe)), *_called(recipe)):
            if name not in seen:
                seen.add(name)
                yield name, recipe, spelling


def _one_step_from(recipe: Recipe, plain: Spelling) -> Iterator[tuple[str, Spelling]]:
    """``plain`` with one word replaced, then later words as plain as they still can be; two steps for products."""
    yield from _other_terms(recipe, plain)
    for at, axis in enumerate(AXES):
        for word in options(recipe, plain, axis):
            changed = plainest(recipe, plain.saying(axis, word), at + 1)
            yield f"{axis}: {word}", changed
            if axis in ("arrive", "heads", "product"):
                yield from _one_step_from_layout(recipe, changed, at + 1)


def _called(recipe: Recipe) -> Iterator[tuple[str, Spelling]]:
    """A call where one fits, in every way to give it its mask, scale and heads."""
    start = AXES.index("call") + 1
    for call in options(recipe, plain := plainest(recipe), "call")[1:]:
        called = plainest(recipe, plain.saying("call", call), start)
        for axis in ("heads", "scale", "apply"):
            for word in options(recipe, called, axis):
                yield f"{call}, {axis}: {word}", called.saying(axis, word)


def _one_step_from_layout(recipe: Recipe, plain: Spelling, start: int) -> Iterator[tuple[str, Spelling]]:
    for at, axis in enumerate(AXES[start:], start):
        if axis in ("product", "weighted", "softmax"):
            for word in options(recipe, plain, axis):
                changed = plainest(recipe, plain.saying(axis, word), at + 1)
                yield f"{axis}: {word} ({plain.arrive}, {plain.heads}, {changed.layout})", changed


def _other_terms(recipe: Recipe, plain: Spelling) -> Iterator[tuple[str, Spelling]]:
    for index, part in enumerate(recipe):
        for word in term_options(recipe, plain, part):
            terms = (*plain.terms[:index], word, *plain.terms[index + 1 :])
            yield f"{part.word}: {word}", replace(plain, terms=terms)


_GROUPED = replace(DISTINCT, kv_heads=2)
_SAMPLES = (
    Recipe(DISTINCT),
    Recipe(_GROUPED),
    Recipe(replace(DISTINCT, batch=(3, 2))),
    Recipe(DISTINCT, scale=0.3),
    Recipe(DISTINCT, scale="temperature"),
    Recipe(DISTINCT, softcap=2.5),
    *(Recipe(DISTINCT, scale=0.3, biases=(part,)) for part in _BIASES),
    *(Recipe(DISTINCT, scale=0.3, masks=(part,)) for part in _CAPTURED_MASKS),
    *(Recipe(DISTINCT, scale=0.3, masks=(parts.causal(offset),)) for offset in (0, 2, -1)),
    Recipe(DISTINCT, masks=(parts.window(-2),)),
    Recipe(DISTINCT, scale=0.3, masks=(parts.causal(2), parts.window(-1), parts.padding())),
    *(Recipe(DISTINCT, masks=(parts.causal(2),), fill=fill) for fill in _FILLS),
    *(Recipe(DISTINCT, masks=(parts.causal(2),), fill=fill, added=True) for fill in _FILLS[1:]),
    Recipe(DISTINCT, scale=0.3, masks=(parts.causal(2),), sink=True),
    Recipe(_GROUPED, scale=0.3, masks=(parts.causal(2), parts.padding()), sink=True),
    *(Recipe(DISTINCT, scale=0.3, masks=(parts.causal(2), parts.padding()), weights=way) for way in list(WEIGHTS)[1:]),
    Recipe(_GROUPED, scale="temperature", masks=(parts.causal(),), weights="safe softmax"),
    Recipe(DISTINCT, scale=0.3, biases=(parts.bias("h", "m", "n"),), weights="safe softmax"),
    Recipe(DISTINCT, biases=(parts.alibi_keys(),), masks=(parts.padding(),), weights="safe softmax"),
)
