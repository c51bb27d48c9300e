"""Which schedule a target is given: a table a target, first row that fits. Figures behind them are in NOTES.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attnfuse.kernels.schedule import Schedule
from attnfuse.target import Target

__all__ = ["Shape", "backward_schedules", "schedule_for", "with_splits"]


@dataclass(frozen=True)
class Shape:
    """What a schedule is chosen by: the head sizes as powers of two, bytes of an element, whether tiles are skipped."""

    padded: int
    value_padded: int
    itemsize: int
    banded: bool
    rows: int

    @property
    def widest(self) -> int:
        """The larger of both head sizes."""
        return max(self.padded, self.value_padded)


#: Head size at most, then the schedule; for two-byte elements.
_HOPPER = (
    (64, Schedule(rows=128, keys=64, loading="descriptor", warps=4, stages=3)),
    (128, Schedule(rows=64, keys=64, loading="descriptor", warps=4, stages=3)),
    (256, Schedule(rows=128, keys=64, loading="descriptor", warps=8, stages=2)),
    (512, Schedule(rows=64, keys=32, loading="descriptor", warps=8, stages=1)),
)
_AMPERE = (
    (64, Schedule(rows=128, keys=64, warps=4, stages=3)),
    (128, Schedule(rows=128, keys=32, warps=8, stages=3)),
    (256, Schedule(rows=64, keys=32, warps=4, stages=2)),
    (512, Schedule(rows=32, keys=16, warps=4, stages=1)),
)
_BLACKWELL = (
    (64, Schedule(rows=128, keys=64, loading="descriptor", warps=8, stages=3)),
    (128, Schedule(rows=128, keys=128, loading="descriptor", warps=8, stages=2)),
    *_HOPPER[2:],
)
_CDNA = (
    (64, Schedule(rows=128, keys=64, warps=4, stages=1).with_knobs(waves_per_eu=2, matrix_instr_nonkdim=16)),
    (128, Schedule(rows=256, keys=64, warps=8, stages=1).with_knobs(waves_per_eu=2, matrix_instr_nonkdim=16)),
    (256, Schedule(rows=64, keys=32, warps=4, stages=1).with_knobs(matrix_instr_nonkdim=16)),
    (512, Schedule(rows=32, keys=16, warps=4, stages=1).with_knobs(matrix_instr_nonkdim=16)),
)
_PONTE_VECCHIO = (
    (64, Schedule(rows=128, keys=64, loading="descriptor", warps=16, stages=3).with_knobs(grf_mode="256")),
    (128, Schedule(rows=128, keys=64, loading="descriptor", warps=16, stages=3).with_knobs(grf_mode="256")),
    (512, Schedule(rows=128, keys=32, loading="descriptor", warps=32, stages=2).with_knobs(grf_mode="256")),
)
#: By the beginning of ``str(target)``; the first that fits.
_TABLES = (
    ("cuda:sm10", _BLACKWELL),
    ("cuda:sm9", _HOPPER),
    ("cuda", _AMPERE),
    ("rocm", _CDNA),
    ("xpu", _PONTE_VECCHIO),
)


def schedule_for(target: Target, shape: Shape) -> Schedule:
    """The schedule of a target for a shape; small tiles where elements have four bytes."""
    table = next((rows for name, rows in _TABLES if str(target).startswith(name)), _AMPERE)
    found = next(schedule for widest, schedule in table if shape.widest <= widest)
    if shape.itemsize > 2:
        found = _for_four_bytes(found, shape)
    if shape.rows <= 64:
        found = replace(found, rows=max(16, min(found.rows, _power(shape.rows))), warps=min(found.warps, 4))
    return replace(found, order="longest first") if shape.banded else found


#: Programs that one processor holds while a few rows are decoded.
_RESIDENT = 2
_MOST_SPLITS = 128


def with_splits(found: Schedule, programs: int, keys: int, processors: int) -> Schedule:
    """The schedule with keys split where there are too few programs to fill the processors, and more than four tiles.

    The fewest splits whose last wave is within 85% of as full as any (FlashAttention-3's rule).
    """
    tiles, slots = -(-keys // found.keys), processors * _RESIDENT
    if programs >= 0.8 * slots or tiles <= 4:
        return found
    filled = {splits: programs * splits / slots for splits in range(1, min(tiles, _MOST_SPLITS) + 1)}
    efficiency = {splits: waves / math.ceil(waves) for splits, waves in filled.items()}
    enough = 0.85 * max(efficiency.values())
    splits = next(splits for splits, share in efficiency.items() if share >= enough)
    return found if splits == 1 else replace(found, algorithm="split keys", splits=splits, order="plain")


def _for_four_bytes(found: Schedule, shape: Shape) -> Schedule:
    rows = 64 if shape.widest <= 128 else 32
    keys = 32 if shape.widest <= 128 else 16
    return replace(found, rows=rows, keys=keys, warps=4, stages=min(found.stages, 2))


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


#: The backward: head size at most, then the schedules of dQ and of dK and dV; for two-byte elements.
_BACKWARD = (
    (64, Schedule(rows=128, keys=64, warps=8, stages=3), Schedule(rows=64, keys=128, warps=8, stages=3)),
    (128, Schedule(rows=128, keys=64, warps=8, stages=3), Schedule(rows=64, keys=128, warps=8, stages=3)),
    (256, Schedule(rows=64, keys=32, warps=4, stages=1), Schedule(rows=32, keys=64, warps=8, stages=1)),
    (512, Schedule(rows=32, keys=16, warps=4, stages=1), Schedule(rows=16, keys=32, warps=8, stages=1)),
)
#: Where a band skips tiles, small ones skip more; where scores read tensors of their own, those need room too.
_BACKWARD_SMALL = (
    (128, Schedule(rows=64, keys=64, warps=4, stages=3), Schedule(rows=32, keys=64, warps=4, stages=3)),
    *_BACKWARD[2:],
)


def backward_schedules(shape: Shape, *, crowded: bool) -> tuple[Schedule, Schedule]:
    """The schedules of dQ and of dK and dV; ``crowded`` says that scores read tensors of their own."""
    table = _BACKWARD_SMALL if crowded else _BACKWARD
    rows, keys = next((rows, keys) for most, rows, keys in table if shape.widest <= most)
    if shape.banded and not crowded:
        keys = next(keys for most, _, keys in _BACKWARD_SMALL if shape.widest <= most)
    if shape.itemsize > 2:
        size = 32 if shape.widest <= 128 else 16
        rows, keys = (replace(each, rows=size, keys=size, warps=4, stages=1) for each in (rows, keys))
    return rows, keys
