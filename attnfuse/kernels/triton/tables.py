"""Which schedule a target is given: a table a target, first row that fits. Figures behind them are in NOTES.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attnfuse.kernels.schedule import Schedule
from attnfuse.target import Target

__all__ = [
    "BackwardSchedules",
    "Shape",
    "backward_schedules",
    "keys_outside_for",
    "schedule_for",
    "with_spans",
    "with_splits",
]


@dataclass(frozen=True)
class Shape:
    """What a schedule is chosen by: the head sizes as powers of two, bytes of an element, whether tiles are skipped.

    ``narrow`` says that query and key have elements of one byte, whatever value has.
    """

    padded: int
    value_padded: int
    itemsize: int
    banded: bool
    rows: int
    narrow: bool = False

    @property
    def widest(self) -> int:
        """The larger of both head sizes."""
        return max(self.padded, self.value_padded)


#: Head size at most, then the schedule; for elements of one byte, of one byte in the first product, and of two.
_HOPPER_FLOAT8 = (
    (128, Schedule(rows=64, keys=128, loading="descriptor", warps=4, stages=2)),
    (256, Schedule(rows=128, keys=64, loading="descriptor", warps=8, stages=2)),
    (512, Schedule(rows=64, keys=32, loading="descriptor", warps=8, stages=1)),
)
_HOPPER_WIDENED = (
    (128, Schedule(rows=128, keys=64, loading="descriptor", warps=4, stages=3)),
    (256, Schedule(rows=128, keys=64, loading="descriptor", warps=8, stages=2)),
    (512, Schedule(rows=64, keys=32, loading="descriptor", warps=8, stages=1)),
)
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
_CDNA_KEYS_OUTSIDE = (
    (64, Schedule("keys outside", rows=64, keys=128, warps=4, stages=1).with_knobs(matrix_instr_nonkdim=16)),
    (128, Schedule("keys outside", rows=64, keys=64, warps=4, stages=1).with_knobs(matrix_instr_nonkdim=16)),
)
#: Waves of 32 lanes, 256 registers at most: the largest tiles that nothing spills of, but for heads beyond 256.
_RDNA = (
    (64, Schedule(rows=128, keys=64, warps=8, stages=1)),
    (128, Schedule(rows=64, keys=16, warps=4, stages=1)),
    (512, Schedule(rows=32, keys=16, warps=8, stages=1)),
)
_PONTE_VECCHIO = (
    (64, Schedule(rows=128, keys=64, loading="descriptor", warps=16, stages=3).with_knobs(grf_mode="256")),
    (128, Schedule(rows=128, keys=64, loading="descriptor", warps=16, stages=3).with_knobs(grf_mode="256")),
    (512, Schedule(rows=128, keys=32, loading="descriptor", warps=32, stages=2).with_knobs(grf_mode="256")),
)
#: By the beginning of ``str(target)``; the first that fits. Where elements have one byte others come before them.
_FLOAT8 = (("cuda:sm9", _HOPPER_FLOAT8),)
_WIDENED = (("cuda:sm9", _HOPPER_WIDENED),)
_TABLES = (
    ("cuda:sm10", _BLACKWELL),
    ("cuda:sm9", _HOPPER),
    ("cuda", _AMPERE),
    ("rocm:gfx1", _RDNA),
    ("rocm", _CDNA),
    ("xpu", _PONTE_VECCHIO),
)


def schedule_for(target: Target, shape: Shape) -> Schedule:
    """The schedule of a target for a shape; small tiles where elements have four bytes."""
    tables = (*(_FLOAT8 if shape.itemsize == 1 else _WIDENED if shape.narrow else ()), *_TABLES)
    table = next((rows for name, rows in tables if str(target).startswith(name)), _AMPERE)
    found = next(schedule for widest, schedule in table if shape.widest <= widest)
    if shape.itemsize > 2:
        found = _for_four_bytes(found, shape)
    if shape.rows <= 64:
        found = replace(found, rows=max(16, min(found.rows, _power(shape.rows))), warps=min(found.warps, 4))
    return replace(found, order="longest first") if shape.banded else found


def keys_outside_for(target: Target, shape: Shape) -> Schedule | None:
    """Keys outside where that is worth a try: on CDNA, whose last cache of 256 MB may hold what is read and written.

    None elsewhere (NOTES.md says why), for a few rows, whose keys are split, and for elements of other than two bytes.
    """
    if not str(target).startswith("rocm:gfx9") or shape.rows <= 64 or shape.itemsize != 2 or shape.narrow:
        return None
    found = next((schedule for widest, schedule in _CDNA_KEYS_OUTSIDE if shape.widest <= widest), None)
    return replace(found, order="longest first") if found is not None and shape.banded else found


def with_spans(found: Schedule, heads: int, rows: int, processors: int) -> Schedule:
    """The schedule with as few spans of each head's rows as give every processor a program."""
    return replace(found, spans=max(1, min(-(-processors // heads), -(-rows // found.rows))))


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


@dataclass(frozen=True)
class BackwardSchedules:
    """Those of dQ, of dK, and of dV; ``values`` is None where one launch makes both of these."""

    rows: Schedule
    keys: Schedule
    values: Schedule | None = None


_ROWS_128 = Schedule(rows=128, keys=64, warps=8, stages=3)
_BACKWARD_256 = BackwardSchedules(
    rows=Schedule(rows=64, keys=32, warps=4, stages=1), keys=Schedule(rows=32, keys=64, warps=8, stages=1)
)
_BACKWARD_512 = BackwardSchedules(
    rows=Schedule(rows=32, keys=16, warps=4, stages=1), keys=Schedule(rows=16, keys=32, warps=8, stages=1)
)
#: The sums of dK and dV for 128 keys would be all registers that there are: one after the other they have the tiles
#: that dQ has, and eight products in large tiles take half the time of seven in small ones.
_APART_256 = BackwardSchedules(
    rows=Schedule(rows=128, keys=32, warps=8, stages=3),
    keys=Schedule(rows=32, keys=128, warps=8, stages=3),
    values=Schedule(rows=32, keys=128, warps=8, stages=4),
)
_CROWDED_256 = BackwardSchedules(
    rows=Schedule(rows=64, keys=32, warps=4, stages=3), keys=Schedule(rows=64, keys=64, warps=8, stages=2)
)
#: The backward: head size at most, then the schedules of whole scores, behind a band, whose small tiles skip more, and
#: where scores read tensors of their own, which need registers; for two-byte elements.
_BACKWARD = (
    (
        128,
        BackwardSchedules(_ROWS_128, Schedule(rows=64, keys=128, warps=8, stages=3)),
        BackwardSchedules(_ROWS_128, Schedule(rows=32, keys=64, warps=4, stages=3)),
        BackwardSchedules(_ROWS_128, Schedule(rows=64, keys=64, warps=4, stages=2)),
    ),
    (256, _BACKWARD_256, _BACKWARD_256, _BACKWARD_256),
    (512, _BACKWARD_512, _BACKWARD_512, _BACKWARD_512),
)
_BACKWARD_HOPPER = (_BACKWARD[0], (256, _APART_256, _APART_256, _CROWDED_256), _BACKWARD[2])
#: Bytes of shared memory of a program, by the beginning of ``str(target)``; the first that fits.
_SHARED = (
    ("cuda:sm9", 227 << 10),
    ("cuda:sm10", 227 << 10),
    ("cuda:sm80", 163 << 10),
    ("cuda", 99 << 10),
    ("rocm:gfx95", 160 << 10),
    ("rocm", 64 << 10),
    ("xpu", 128 << 10),
)


def backward_schedules(target: Target, shape: Shape, crowd: int) -> BackwardSchedules:
    """The schedules of a backward; ``crowd`` are bytes of captured tensors that each score reads."""
    table = _BACKWARD_HOPPER if str(target).startswith("cuda:sm9") else _BACKWARD
    whole, banded, crowded = next(schedules for most, *schedules in table if shape.widest <= most)
    found = crowded if crowd else banded if shape.banded else whole
    if shape.itemsize > 2:
        size = 32 if shape.widest <= 128 else 16
        found = BackwardSchedules(*2 * [Schedule(rows=size, keys=size, warps=4, stages=1)])
    room = next((size for name, size in _SHARED if str(target).startswith(name)), _SHARED[0][1])
    both = shape.padded + shape.value_padded
    return BackwardSchedules(
        _fitting(found.rows, shape, crowd, room, both, turned=False),
        _fitting(found.keys, shape, crowd, room, both, turned=True),
        None if found.values is None else _fitting(found.values, shape, crowd, room, shape.padded, turned=True),
    )


def _fitting(found: Schedule, shape: Shape, crowd: int, room: int, kept: int, *, turned: bool) -> Schedule:
    """The schedule with as many stages as there is shared memory for, and smaller tiles where one is too many.

    What stays are ``kept`` numbers of a program's own rows, or keys where it is ``turned``; with a crowd it keeps its
    weights there too. A stage holds the other's tiles, and what its scores read.
    """
    while True:
        stay, pass_by = (found.keys, found.rows) if turned else (found.rows, found.keys)
        scores, width = found.rows * found.keys, (shape.padded + shape.value_padded) * shape.itemsize
        fixed = stay * kept * shape.itemsize + (2 * scores * shape.itemsize if turned and crowd else 0)
        stage = pass_by * width + scores * crowd
        if fixed + stage <= room or found.rows * found.keys <= 16 * 16:
            return replace(found, stages=max(1, min(found.stages, (room - fixed) // stage)))
        larger = "rows" if found.rows >= found.keys else "keys"
        found = replace(found, **{larger: getattr(found, larger) // 2})
