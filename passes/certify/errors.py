"""How far two results are from the exact one, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnfuse.errors import NotEquivalent

__all__ = ["Errors", "compare"]

#: The replacement may err this many times as much as the source: summing in another order moves an
#: error by about its own size, and a maximum over few elements is a noisy estimate.
_FACTOR = 4.0

#: Units in the last place at the largest exact value that are no error: the source may be exact by luck.
_FLOOR = 8.0


@dataclass(frozen=True)
class Errors:
    """Mean and maximum absolute error against float64, of the source and of the replacement."""

    source_mean: float
    source_max: float
    fused_mean: float
    fused_max: float


def compare(
    what: str,
    source: Tensor,
    fused: Tensor,
    exact: Tensor,
    moved: Sequence[Callable[[], Tensor]] = (),
    rounding: float = 0.0,
) -> Errors:
    """The errors of both. Raises :class:`NotEquivalent`, beginning with ``what``, where ``fused`` is too far off.

    A source may be exact by luck where its problem is ill-conditioned. The best that a program which rounds can promise
    is the exact result of inputs that are one rounding away (N. Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 1.5). So before anything is called wrong, the largest error of such results, ``moved``, counts as an
    error of the source too.
    Where the source is NaN or infinite, fused may be so too, or finite if ``exact`` is: an overflow of an
    intermediate need not be repeated. ``rounding`` is what operands were rounded by on request: the error may be as
    large, relative to the mean and the largest exact value.
    """
    if (source.shape, source.dtype) != (fused.shape, fused.dtype):
        raise NotEquivalent(f"{what} is {fused.dtype}{list(fused.shape)}, not {source.dtype}{list(source.shape)}")
    repaired = fused.isfinite() & exact.isfinite()
    if bool(((fused.isnan() != source.isnan()) & ~repaired).any()):
        raise NotEquivalent(f"{what} is NaN at other places than in the source")
    overflowed = source.isinf() & ~repaired
    if bool((overflowed & (fused != source)).any()):
        raise NotEquivalent(f"{what} is infinite at other places than in the source")
    known = exact.isfinite() & source.isfinite()
    theirs, ours = _mean_and_max(source, exact, known), _mean_and_max(fused, exact, known)
    floor = _FLOOR * torch.finfo(source.dtype).eps * _largest(exact)
    sizes = _mean_and_max(torch.zeros_like(exact), exact, known)
    for at, which in enumerate(("mean", "maximum")):
        least = allowed = theirs[at] + rounding * sizes[at] / _FACTOR
        for result in moved:
            if ours[at] <= _FACTOR * allowed + floor:
                break
            allowed = max(allowed, least + _mean_and_max(result(), exact, known)[at])
        if not ours[at] <= _FACTOR * allowed + floor:
            raise NotEquivalent(f"{what} has {which} error {ours[at]:.2g}, where the source has {theirs[at]:.2g}")
    return Errors(*theirs, *ours)


def _mean_and_max(got: Tensor, exact: Tensor, where: Tensor) -> tuple[float, float]:
    off = (got.double() - exact).abs()[where]
    return (off.mean().item(), off.max().item()) if off.numel() else (0.0, 0.0)


def _largest(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
