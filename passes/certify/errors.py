"""How far two results are from the exact one, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from attnfuse.errors import NotEquivalent

__all__ = ["Errors", "compare", "excused"]

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

    ``moved`` are exact results of other roundings, as :func:`excused` asks for them. Where the source is NaN or
    infinite, fused may be so too, or finite if ``exact`` is: an overflow of an intermediate need not be repeated.
    ``rounding`` is what operands were rounded by on request: the error may be as large, relative to the mean and the
    largest exact value.
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
        least = theirs[at] + rounding * sizes[at] / _FACTOR
        spared = (_mean_and_max(result(), exact, known)[at] for result in moved)
        if not excused(ours[at], least, spared, lambda error: _FACTOR * error + floor):
            raise NotEquivalent(f"{what} has {which} error {ours[at]:.2g}, where the source has {theirs[at]:.2g}")
    return Errors(*theirs, *ours)


def excused(ours: float, theirs: float, spared: Iterable[float], limit: Callable[[float], float]) -> bool:
    """Whether an error is at most ``limit`` of the source's: of the one it has, or of one it was spared by luck.

    ``spared`` are errors of :func:`attnfuse.graph.double.otherwise_rounded`, and are asked for one by one.
    """
    allowed = theirs
    for error in chain((0.0,), spared):
        allowed = max(allowed, theirs + error)
        if ours <= limit(allowed):
            return True
    return False


def _mean_and_max(got: Tensor, exact: Tensor, where: Tensor) -> tuple[float, float]:
    off = (got.double() - exact).abs()[where]
    return (off.mean().item(), off.max().item()) if off.numel() else (0.0, 0.0)


def _largest(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
