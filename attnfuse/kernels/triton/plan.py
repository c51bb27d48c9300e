"""Everything about a launch that is constant while a kernel runs, as one value that bodies take as a ``constexpr``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.text import function_text
from attnfuse.score import Expr
from attnfuse.spec import Captured

__all__ = ["BackwardPlan", "Plan"]


@dataclass(frozen=True, repr=False)
class Plan:
    """Programs, tile sizes and which parts of a body there are. Bodies read its fields: ``PLAN.keys``.

    ``width`` and ``value_width`` are the head sizes, ``padded`` and ``value_padded`` the powers of two they are
    computed as. ``groups`` query heads share a key head; ``packed`` puts them into one tile of rows. ``left`` and
    ``right`` say that the mask's band is closed on that side, ``rest`` that rows which keep no key must see the
    keys outside of it too, where no logit is above ``floor``. ``even`` says that tiles divide the keys. ``wide``
    are 64-bit offsets within a tile. ``precise`` differences of logits are taken before they are multiplied: one of
    them may be as large as floats are, or a product's rounding counts, as it does in float32. Weights are multiplied by
    ``key_factor_program`` in the tile and by ``row_factor_program`` when a row is done; query is multiplied with key as
    ``scores``, weights with value as ``weights``, names of types. Weights in the loop are at most ``2 ** headroom``.
    """

    schedule: Schedule
    captures: tuple[Captured, ...]
    masked_program: Expr
    core_program: Expr
    sink_program: Expr | None
    exponent: float
    factor: float
    huge: bool
    precise: bool
    batch: int
    groups: int
    packed: bool
    width: int
    value_width: int
    padded: int
    value_padded: int
    value_minor: str
    left: bool
    right: bool
    rest: bool
    floor: float
    even: bool
    precision: str
    dropout: float
    with_lse: bool
    fast: bool
    wide: bool
    key_factor_program: Expr | None
    row_factor_program: Expr | None
    scores: str
    weights: str
    headroom: float

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.schedule.rows

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.schedule.keys

    @property
    def group(self) -> int:
        """Query heads whose rows share a tile."""
        return self.groups if self.packed else 1

    @property
    def splits(self) -> int:
        """Spans of keys that are computed apart."""
        return self.schedule.splits

    @property
    def keys_outside(self) -> bool:
        """Which of the bodies runs."""
        return self.schedule.algorithm == "keys outside"

    @property
    def spans(self) -> int:
        """Spans of a head's rows that are computed apart, where keys are outside."""
        return self.schedule.spans

    @property
    def splits_padded(self) -> int:
        """The power of two that :func:`attnfuse.kernels.triton.forward.merge` loads them as."""
        return 1 << (self.schedule.splits - 1).bit_length()

    @property
    def stages(self) -> int:
        """How deep loads are pipelined."""
        return self.schedule.stages

    @property
    def order(self) -> str:
        """In which order tiles of rows are done."""
        return self.schedule.order

    @property
    def descriptors(self) -> bool:
        """Whether keys and values are loaded by descriptor."""
        return self.schedule.loading == "descriptor"

    @property
    def dropped_below(self) -> int:
        """Dropout drops a weight whose 31 bits are below."""
        return round(self.dropout * 2**31)

    @property
    def kept_scale(self) -> float:
        """What dropout multiplies the weights with that it keeps."""
        return 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0

    @property
    def pipelining(self) -> str:
        """What overlaps in the loop."""
        return self.schedule.pipelining

    @cached_property
    def masked(self) -> Any:
        """The program of any key."""
        return self._function(self.masked_program)

    @cached_property
    def core(self) -> Any:
        """The program of keys that the mask's band keeps."""
        return self._function(self.core_program)

    @cached_property
    def sink(self) -> Any:
        """The program of the sink, or None."""
        return self._function(self.sink_program)

    @cached_property
    def key_factor(self) -> Any:
        """What weights are multiplied by that varies along the keys, or None."""
        return self._function(self.key_factor_program)

    @cached_property
    def row_factor(self) -> Any:
        """What rows of the result are multiplied by, or None."""
        return self._function(self.row_factor_program)

    @property
    def apart(self) -> bool:
        """Whether a tile's products are summed apart: NVIDIA's units sum float8 with few bits."""
        return self.headroom > 0.0 and self.fast

    @property
    def sink_weight(self) -> float:
        """The weight of a row's maximum."""
        return float(2.0**self.headroom)

    @cached_property
    def score_type(self) -> Any:
        """The type in which query and key are multiplied."""
        return _triton_type(self.scores)

    @cached_property
    def weight_type(self) -> Any:
        """The type in which weights and value are multiplied."""
        return _triton_type(self.weights)

    def _function(self, program: Expr | None) -> Any:
        # Triton is there when a kernel is launched, not before
        from attnfuse.kernels.triton.program import jit_function  # noqa: PLC0415

        return jit_function(program, self.captures, fast=self.fast, wide=self.wide)

    @cached_property
    def _digest(self) -> str:
        """Of every field, a program counting as its text: how texts are written may change between versions."""
        written = [(each.name, self._written(each.name)) for each in fields(self)]
        return hashlib.sha256(repr(written).encode()).hexdigest()[:24]

    def _written(self, name: str) -> object:
        value = getattr(self, name)
        if value is None or not name.endswith("_program"):
            return value
        return function_text(value, self.captures, fast=self.fast, wide=self.wide)

    # Triton makes names of functions and of cache entries from a constant's text
    def __repr__(self) -> str:
        return f"plan_{self._digest}"

    # Triton looks a launch up by its constants, and to hash the fields is to walk their programs
    def __hash__(self) -> int:
        return hash(self._digest)

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the plan by."""
        return self._digest


def _triton_type(name: str) -> Any:
    import triton.language as tl  # noqa: PLC0415 - Triton is imported when it is launched

    return getattr(tl, name)


@dataclass(frozen=True, repr=False)
class BackwardPlan(Plan):
    """A plan of a backward: the derivatives of the programs, and of one captured tensor.

    ``uncertain`` says that a row may keep nothing behind a finite fill; ``reduce`` over what the gradient of the
    captured tensor is summed within a program: ``heads``, ``keys`` or ``rows``, or nothing where there is none.
    ``upright`` tiles of dK and dV are ``[rows, keys]``, as a captured tensor that is read for each score lies.
    """

    masked_pulled_program: Expr
    core_pulled_program: Expr
    captured_program: Expr | None
    even_rows: bool
    uncertain: bool
    reduce: str
    upright: bool

    @cached_property
    def masked_pulled(self) -> Any:
        """From the gradient of any key's ``u`` to that of its raw score."""
        return self._function(self.masked_pulled_program)

    @cached_property
    def core_pulled(self) -> Any:
        """The same of keys that the mask's band keeps."""
        return self._function(self.core_pulled_program)

    @cached_property
    def captured(self) -> Any:
        """From the gradient of a logit to that of the captured tensor."""
        return self._function(self.captured_program)

    __hash__ = Plan.__hash__
