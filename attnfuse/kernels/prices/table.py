"""Tables of layout prices, as they are read from files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnfuse.cache import believed, folder
from attnfuse.errors import BadInput
from attnfuse.kernels.float8 import product_types
from attnfuse.kernels.problem import Problem
from attnfuse.reference import name_of
from attnfuse.target import Target

__all__ = ["Table", "factor", "measured_path", "prices_of"]

_SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """Bandwidths in bytes a second, reads and writes both counted, and times of kernels as ratios.

    ``copy`` is the bandwidth of a copy that transposes, by the bytes of an element (``"1"``, ``"2"``...), ``stream``
    that of a pass that reads and writes in one order. ``factors[kernel][dtype][operand]`` is a kernel's time with that
    operand n-minor over its time with all operands d-minor; where there is none it is 1. ``dtype`` is torch's name,
    or ``float8`` for all of that width.
    """

    target: str
    source: str
    stream: float
    copy: dict[str, float]
    factors: dict[str, dict[str, dict[str, float]]]

    def copy_seconds(self, elements: int, dtype: torch.dtype) -> float:
        """Seconds of a copy that transposes so many elements; a width that was not measured is taken as a narrower."""
        widths = sorted(map(int, self.copy))
        known = max((width for width in widths if width <= dtype.itemsize), default=widths[0])
        return 2 * elements * dtype.itemsize / self.copy[str(known)]

    def pass_seconds(self, elements: int, dtype: torch.dtype) -> float:
        """Seconds of reading and writing so many elements in one order."""
        return 2 * elements * dtype.itemsize / self.stream


def factor(kernel: str, problem: Problem, target: Target) -> float:
    """A kernel's time with the problem's layouts over its time with all operands d-minor.

    What counts is the type that value can be multiplied in.
    """
    by_dtype = prices_of(target).factors.get(kernel, {})
    dtype = name_of(product_types(problem.spec, problem.dtypes, target)[1])
    known = by_dtype.get(dtype) or by_dtype.get(dtype.partition("_")[0], {})
    return math.prod(known.get(operand, 1.0) for operand, minor in problem.minors.items() if minor == "n")


@lru_cache
def prices_of(target: Target) -> Table:
    """The table of a target: measured here, shipped for its architecture, for its kind, or the most cautious.

    Raises :class:`BadInput` when a table that was measured cannot be read.
    """
    measured = measured_path(target)
    if believed() and measured.is_file():
        return _read(measured)
    names = (_name(target), _name(Target(target.kind)), "cautious")
    return _read(next(path for path in (_SHIPPED / f"{name}.json" for name in names) if path.is_file()))


def measured_path(target: Target) -> Path:
    """Where the table that was measured for a target is kept."""
    return folder() / f"layouts-{_name(target)}.json"


def _name(target: Target) -> str:
    return str(target).replace(":", "-")


def _read(path: Path) -> Table:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Table(**raw)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} is no table of layout prices: {error}") from error
