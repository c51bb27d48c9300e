"""When two specs are one: equal up to the order of captures and conjuncts, and up to algebra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import torch
from torch import Tensor

from attnfuse import reference
from attnfuse.features import Causal, Feature, Scale, Softcap, Window, features
from attnfuse.score import Const, Expr, text
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["assert_same_spec", "differences"]

#: Sizes of b0, b1, ... and of h, m, n, no two equal; a score of the larger magnitude is seen beside a fill of -1e9.
_BATCH, _SCORE = (2, 3, 2), (4, 5, 7)
_MAGNITUDES = (1.0, 1e4)
_CONSTANT_ROUNDING = 1e-6


def assert_same_spec(got: AttentionSpec, want: AttentionSpec) -> None:
    """``got`` means what ``want`` means, and its parts have the same names.

    Captures may come in any order: some one-to-one renaming of equal axes and dtypes must make the programs agree
    on random scores, every index and random captures, in float64; and name the same features.
    """
    found = differences(got, want)
    assert not found, "\n".join([f"got  {got.to_text()}", f"want {want.to_text()}", *found])


def differences(got: AttentionSpec, want: AttentionSpec) -> list[str]:
    """What distinguishes two specs, in words; empty when they are one."""
    found = [
        f"{name}: {getattr(got, name)}, not {getattr(want, name)}"
        for name in (
            *("batch", "dropout", "symbols", "normaliser", "empty_rows", "exact_scores", "weight_dtype", "out_dtype"),
        )
        if getattr(got, name) != getattr(want, name)
    ]
    if (got.sink is None) != (want.sink is None):
        found.append("one has a sink")
    if _names(got) != _names(want):
        found.append(f"parts: {_names(got)}, not {_names(want)}")
    if not found and not any(_agree(got, want, order) for order in _renamings(got.captures, want.captures)):
        found.append("the programs differ, whatever capture is taken for which")
    return found


def _renamings(got: tuple[Captured, ...], want: tuple[Captured, ...]) -> Iterator[tuple[int, ...]]:
    """Orders in which want's captures are got's captures."""
    if len(got) == len(want):
        for order in permutations(range(len(want))):
            if tuple(want[slot] for slot in order) == got:
                yield order


def _names(spec: AttentionSpec) -> list[str] | None:
    """The features in words, in sorted order; None for a program without a form."""
    found = features(spec)
    return None if found is None else sorted(map(_name, found))


def _name(feature: Feature) -> str:
    match feature:
        case Causal(offset) | Window(offset):
            return f"{type(feature).__name__} {text(offset)}"
        case Scale(Const(value)):
            return f"Scale {float(value):.5g}"
        case Softcap(cap):
            return f"Softcap {cap:.5g}"
    return type(feature).__name__


def _agree(got: AttentionSpec, want: AttentionSpec, order: tuple[int, ...]) -> bool:
    random = torch.Generator().manual_seed(0)
    spans = tuple((0, size) for size in (*_BATCH[: want.batch], *_SCORE))
    captures = [_capture(captured, want, random) for captured in want.captures]
    shape = [last for _, last in spans]
    for magnitude in _MAGNITUDES:
        score = torch.randn(shape, generator=random, dtype=torch.float64) * magnitude
        scope = reference.Scope(spans, captures, (), torch.float64, score.device, score, score.softmax(-1))
        renamed = replace(scope, captures=[captures[slot] for slot in order])
        if not all(map(_close, _values(got, renamed), _values(want, scope))):
            return False
    return True


def _values(spec: AttentionSpec, scope: reference.Scope) -> list[Tensor]:
    programs: list[Expr] = [spec.score, spec.weight, *([] if spec.sink is None else [spec.sink])]
    assert scope.score is not None
    return [reference.evaluate(program, scope).expand(scope.score.shape).double() for program in programs]


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=_CONSTANT_ROUNDING, atol=_CONSTANT_ROUNDING, equal_nan=True)


def _capture(captured: Captured, spec: AttentionSpec, random: torch.Generator) -> Tensor:
    extent = dict(zip(spec.axes, (*_BATCH[: spec.batch], *_SCORE), strict=True))
    shape = [extent[axis] if axis in captured.axes else 1 for axis in spec.axes]
    match captured.dtype:
        case "bool":
            return torch.rand(shape, generator=random) < 0.5
        case "int64" | "int32":
            return torch.randint(0, 3, shape, generator=random)
    return torch.randn(shape, generator=random, dtype=torch.float64)
