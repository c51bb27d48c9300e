"""What the figures must show, worked out from the rows, each with its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean

from benchmark.cases import DTYPES, VARIANTS
from benchmark.measure import Row
from benchmark.peers import OURS

__all__ = ["Target", "growth", "speed"]


@dataclass(frozen=True)
class Target:
    """One claim: a measured value, its limit, which side of it is right, and where the value comes from."""

    claim: str
    value: float
    limit: float
    at_least: bool = False
    where: str = ""

    @property
    def met(self) -> bool:
        """Whether the value is on the right side; a NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict, sign = "met   " if self.met else "MISSED", ">=" if self.at_least else "<="
        place = f" ({self.where})" if self.where else ""
        return f"{verdict}  {self.claim}: {self.value:.2f}{place}, must be {sign} {self.limit:g}"


def speed(rows: Sequence[Row]) -> list[Target]:
    """No row slower than the best of eager and Inductor, and long ones faster than Inductor on average."""
    # a row without our figure has ratio NaN, which compares with nothing: it must come first
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.ratio) else row.ratio)
    found = [Target("time / best of eager and Inductor, worst row", worst.ratio, 1.05, where=str(worst.case))]
    if long := [row.speedup for row in rows if row.case.length >= 2048 and row.case.variant.rows is None]:
        claim = f"speed-up over Inductor, geometric mean of {len(long)} rows with N >= 2048"
        found.append(Target(claim, geometric_mean(long), 1.5, at_least=True))
    return found


def growth(rows: Sequence[Row]) -> list[Target]:
    """Peak memory of each fused variant grows like a power of N; 1 is linear, 2 is the whole score matrix."""
    peaks = {
        (row.case.name, row.case.dtype, row.case.length): figure.peak
        for row in rows
        if (figure := row.figures.get(OURS)) and "unfused" not in row.kernel
    }
    powers = {
        f"{variant.name} {dtype}": math.log2(longer / shorter)
        for variant, dtype in product(VARIANTS, DTYPES)
        if (longer := peaks.get((variant.name, dtype, 4096))) and (shorter := peaks.get((variant.name, dtype, 2048)))
    }
    if not powers:
        return []
    worst = max(powers, key=lambda name: powers[name])
    return [Target("power of N that peak memory grows with, 2048 to 4096", powers[worst], 1.5, where=worst)]
