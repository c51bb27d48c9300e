"""Which words fit: the choices that a recipe, and the words already chosen, leave on each axis of variation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.property import vocabulary as words
from tests.property.recipe import Part, Recipe

__all__ = ["AXES", "Spelling", "options", "plainest", "term_options"]


@dataclass(frozen=True)
class Spelling:
    """One word for each axis; ``terms`` has one for each bias, then each mask, of the recipe.

    Where ``call`` is a word, one call takes the place of everything from the first product to the second.
    """

    arrive: str = "bhmd"
    call: str = "none"
    heads: str = "same"
    product: str = "matmul"
    key_t: str = "transpose"
    scale: str = "none"
    softcap: str = "none"
    terms: tuple[str, ...] = ()
    add: str = "after"
    apply: str = "masked_fill"
    joined: str = "together"
    sink: str = "none"
    softmax: str = "functional"
    dropout: str = "none"
    weighted: str = "matmul"
    leave: str = "as is"

    def saying(self, axis: str, word: str) -> Spelling:
        """The same but for one word."""
        changed: dict[str, Any] = {axis: word}
        return replace(self, **changed)

    @property
    def layout(self) -> str:
        """The layout of the scores: four, flat, grouped or turned."""
        return words.PRODUCT[self.product][1]


_FOUR_D_KEY_T = ("permute", "transpose positive")
_FINITE_ONLY = ("added 1 - mask", "added inverted")


def term_options(recipe: Recipe, chosen: Spelling, part: Part) -> list[str]:
    """The spellings of one bias or mask that fit."""
    whole_batch = chosen.arrive == "abhmd"
    sliced = part.value == recipe.sizes.keys - recipe.sizes.rows and recipe.sizes.keys >= recipe.sizes.rows
    return [
        word
        for word, term in words.TERMS[part.word].items()
        if (term.any_batch or not whole_batch) and (sliced or word != "tril sliced")
    ]


def plainest(recipe: Recipe, chosen: Spelling | None = None, start: int = 0) -> Spelling:
    """The first word that fits on each axis from ``start`` on, and for each term."""
    chosen = chosen or Spelling()
    for axis in AXES[start:]:
        chosen = chosen.saying(axis, options(recipe, chosen, axis)[0])
    return replace(chosen, terms=tuple(term_options(recipe, chosen, part)[0] for part in recipe))


def options(recipe: Recipe, chosen: Spelling, axis: str) -> list[str]:
    """The words that fit on ``axis``, plainest first; never empty. Terms are chosen part by part instead."""
    if chosen.call != "none" and axis in _INSIDE:
        return [getattr(Spelling(), axis)]
    return _FITTING[axis](recipe, chosen)


#: The axes that a call leaves nothing to say on.
_INSIDE = ("product", "key_t", "softcap", "add", "joined", "sink", "softmax", "dropout", "weighted")


def _arrivals(recipe: Recipe, chosen: Spelling) -> list[str]:
    if len(recipe.sizes.batch) == 2:
        return ["abhmd"]
    same_heads = recipe.sizes.heads == recipe.sizes.kv_heads
    return [w for w in words.ARRIVE if w != "abhmd" and (same_heads or not w.startswith("flat"))]


def _calls(recipe: Recipe, chosen: Spelling) -> list[str]:
    """A call's empty rows are zero, and it takes heads before rows."""
    said = recipe.weights == "safe softmax" and recipe.softcap is None and not recipe.sink
    in_order = words.ARRIVE[chosen.arrive].axes in (("bhmd", "bknd", "bkne"), ("abhmd", "abknd", "abkne"))
    return ["none", "sdpa"] if said and in_order else ["none"]


def _heads(recipe: Recipe, chosen: Spelling) -> list[str]:
    if recipe.sizes.heads == recipe.sizes.kv_heads:
        return ["same"]
    if chosen.call != "none":
        return ["enable_gqa", "repeat_interleave", "expand, flatten"]
    if words.ARRIVE[chosen.arrive].axes != ("bhmd", "bknd", "bkne"):
        return ["repeat_interleave", "expand, flatten"]
    return [word for word in words.HEADS if word not in ("same", "enable_gqa")]


def _products(recipe: Recipe, chosen: Spelling) -> list[str]:
    found = _products_of(chosen)
    # the column of the sinks is joined along the last dimension
    return [word for word in found if not word.startswith("turned")] if recipe.sink else found


def _products_of(chosen: Spelling) -> list[str]:
    if chosen.heads == "grouped":
        return ["grouped", "grouped viewed", "grouped einsum"]
    einsums = ["einsum", "einsum renamed", "einsum swapped"]
    match words.ARRIVE[chosen.arrive].axes[:2]:
        case ("xmd", _):
            return ["bmm", "bmm viewed", "baddbmm", "baddbmm viewed"]
        case ("bmhd", _):
            return [*einsums, "turned einsum"]
        case ("abhmd", _):
            return ["matmul", "@", *einsums, "sum of product", "turned", "turned einsum"]
        case (_, "bkdn"):
            return ["matmul", "@", *einsums, "turned einsum", "bmm", "bmm viewed"]
    return [word for word in words.PRODUCT if not word.startswith("grouped")]


def _key_transposes(recipe: Recipe, chosen: Spelling) -> list[str]:
    template = words.PRODUCT[chosen.product][0]
    if words.ARRIVE[chosen.arrive].axes[1] == "bkdn" or "{k" not in template.replace("{k}", "").replace("{k_", ""):
        return ["transpose"]
    other_rank = chosen.arrive == "abhmd" or "{k3t}" in template
    return [word for word in words.KEY_T if not other_rank or word not in _FOUR_D_KEY_T]


def _scales(recipe: Recipe, chosen: Spelling) -> list[str]:
    if chosen.call != "none" and recipe.scale is not None:
        return ["on q", "on k"] if isinstance(recipe.scale, str) else ["alpha", "on q", "on k"]
    in_product = ["alpha"] if chosen.product.startswith("baddbmm") else []
    match recipe.scale:
        case None:
            return ["none"]
        case str():
            return ["after", "before scores", "torch.mul", "in place", "mul_", "on q", "on k"]
        case value:
            roots = [] if value > 0 else ["on both"]
            excluded = ["none", "alpha", *roots]
            return [*(word for word in words.SCALE if word not in excluded), *in_product]


def _additions(recipe: Recipe, chosen: Spelling) -> list[str]:
    # beta adds the bias before a later scale would be applied
    scaled = recipe.scale is None or chosen.scale in ("alpha", "on q", "on k", "q divided", "on both")
    alone = len(recipe.biases) == 1 and recipe.softcap is None
    in_product = chosen.product.startswith("baddbmm") and scaled and alone
    return [word for word in words.ADD if word != "beta" or in_product]


def _softcaps(recipe: Recipe, chosen: Spelling) -> list[str]:
    return ["none"] if recipe.softcap is None else [word for word in words.SOFTCAP if word != "none"]


def _applications(recipe: Recipe, chosen: Spelling) -> list[str]:
    if chosen.call != "none":
        return _called_masks(recipe)
    added = [word for word in words.APPLY if word.startswith("added")]
    replacing = [word for word in words.APPLY if word not in added]
    if math.isinf(recipe.fill):
        return [*replacing, *(word for word in added if word not in _FINITE_ONLY)]
    return added if recipe.added else replacing


def _called_masks(recipe: Recipe) -> list[str]:
    if recipe.biases:
        return ["bias, filled", "bias, added"] if recipe.masks else ["bias"]
    if not recipe.masks:
        return ["none"]
    causal = [part.word for part in recipe.masks] == ["causal"] and recipe.masks[0].value == 0
    return ["bool", "where", "zeros", *(["is_causal"] if causal else [])]


def _joins(recipe: Recipe, chosen: Spelling) -> list[str]:
    # two finite terms add up to less than either, so only one predicate may be added
    return ["together"] if recipe.added or len(recipe.masks) < 2 else ["together", "apart"]


def _sinks(recipe: Recipe, chosen: Spelling) -> list[str]:
    return [word for word in words.SINK if (word != "none") == recipe.sink]


def _dropouts(recipe: Recipe, chosen: Spelling) -> list[str]:
    return list(words.DROPOUT)


def _softmaxes(recipe: Recipe, chosen: Spelling) -> list[str]:
    # the largest of no scores is an error, and the sinks are no part of a later sum
    if recipe.weights in words.OTHER_WEIGHTS:
        return list(words.OTHER_WEIGHTS[recipe.weights])
    no_maximum = recipe.sizes.keys == 0 and not recipe.sink
    fits = [word for word, way in words.SOFTMAX.items() if not (no_maximum and "max(" in way.replace("softmax(", ""))]
    return [word for word in fits if word != "late division" or not recipe.sink]


def _weighted(recipe: Recipe, chosen: Spelling) -> list[str]:
    value = words.ARRIVE[chosen.arrive].axes[2]
    if chosen.heads == "grouped" and chosen.layout == "four":
        return ["grouped from four"]
    fits = [word for word, way in words.WEIGHTED.items() if way.layout == chosen.layout and word != "grouped from four"]
    if chosen.softmax == "late division":
        fits = [word for word in fits if word != "einsum to bmhe"]
    match value:
        case "bnke":
            return [word for word in fits if "einsum" in word]
        case "abkne":
            return [word for word in fits if word not in ("bmm", "einsum to bmhe")]
        case "xne":
            return ["bmm"] if chosen.layout == "four" else fits
    return fits


def _departures(recipe: Recipe, chosen: Spelling) -> list[str]:
    if words.WEIGHTED[chosen.weighted].axes == "bmhe":
        return ["as is", "contiguous", "flattened"]
    return ["as is", "contiguous", "transposed", "flattened"] if chosen.arrive == "abhmd" else list(words.LEAVE)


#: What fits on each axis, in the order they are chosen: it depends on the recipe and on earlier axes alone.
_FITTING: dict[str, Callable[[Recipe, Spelling], list[str]]] = {
    "arrive": _arrivals,
    "call": _calls,
    "heads": _heads,
    "product": _products,
    "key_t": _key_transposes,
    "scale": _scales,
    "softcap": _softcaps,
    "add": _additions,
    "apply": _applications,
    "joined": _joins,
    "sink": _sinks,
    "softmax": _softmaxes,
    "dropout": _dropouts,
    "weighted": _weighted,
    "leave": _departures,
}
AXES = tuple(_FITTING)
