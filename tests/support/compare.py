"""The one tolerance of all tests: a fused result is as good as the source it replaces.

Both are measured against the same computation in float64, so no test carries a hand-picked number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnfuse.passes.certify import excused

__all__ = ["Errors", "assert_as_good", "errors_against"]

#: What rounding alone may cost, in units of ``eps * magnitude``, where the source was exact by luck: one
#: rounding of the logit, of its exponential, of the row sum and of the product. A mean has no lucky outliers.
_ROUNDINGS_MAX, _ROUNDINGS_MEAN = 4.0, 1.0


@dataclass(frozen=True)
class Errors:
    """Mean and largest absolute error over the elements that are finite on both sides."""

    mean: float
    max: float


def errors_against(exact: Tensor, got: Tensor) -> Errors:
    """Errors of ``got`` against float64 ``exact`` of the same shape."""
    finite = exact.isfinite() & got.isfinite()
    if not finite.any():
        return Errors(0.0, 0.0)
    off = (got.detach().double() - exact)[finite].abs()
    return Errors(off.mean().item(), off.max().item())


def assert_as_good(
    fused: Tensor, source: Tensor, exact: Tensor, *, factor: float = 2.0, moved: Sequence[Callable[[], Tensor]] = ()
) -> None:
    """``fused`` errs at most ``factor`` times as much as ``source``, plus rounding, against float64 ``exact``.

    ``moved`` are exact results of other roundings, asked for where nothing else excuses ``fused``: what they err is
    an error that the source may have been spared by luck, and counts as its own.

    All three have one shape, and fused the source's dtype. NaN and infinities must be where the source has
    them, except that fused may be finite where exact is: the source's overflow need not be repeated.
    """
    assert fused.shape == source.shape == exact.shape, f"shapes {fused.shape}, {source.shape}, {exact.shape}"
    assert fused.dtype == source.dtype, f"dtype {fused.dtype}, and the source's is {source.dtype}"
    exact = exact.detach().double()
    _assert_same_special(fused.detach(), source.detach(), exact)
    known = exact[exact.isfinite()]
    if not known.numel():
        return
    # where only the source overflowed it has no error to measure, and fused is held to the others' bound
    ours, theirs = errors_against(exact, fused), errors_against(exact, source)
    eps, size = torch.finfo(source.dtype).eps, known.abs()
    floors = (_ROUNDINGS_MEAN * eps * size.mean().item(), _ROUNDINGS_MAX * eps * size.max().item())
    spared = [lambda each=each: errors_against(exact, each()) for each in moved]
    _assert_at_most("mean", ours.mean, theirs.mean, (each().mean for each in spared), factor, floors[0])
    _assert_at_most("largest", ours.max, theirs.max, (each().max for each in spared), factor, floors[1])


def _assert_same_special(fused: Tensor, source: Tensor, exact: Tensor) -> None:
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(fused) != test(source)
        repaired = fused.isfinite() & exact.isfinite()
        wrong = (differs & ~repaired).nonzero()
        assert not len(wrong), f"{name} differs from the source at {len(wrong)} places, first at {wrong[0].tolist()}"


def _assert_at_most(
    which: str, ours: float, theirs: float, spared: Iterable[float], factor: float, floor: float
) -> None:
    limit = f"{factor:g} x the source's {theirs:.3e} + {floor:.1e}"
    judged = excused(ours, theirs, spared, lambda error: factor * error + floor)
    assert judged, f"{which} error {ours:.3e}, above {limit}, and above what other roundings do"
