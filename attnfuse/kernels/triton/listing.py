"""One launch that lists the tiles of a mask (:mod:`attnfuse.kernels.triton.tiles`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnfuse.algebra import Bounds, bounds_of
from attnfuse.kernels.triton.text import function_text
from attnfuse.score import Capture, Const, Expr, Index, Symbol, walk
from attnfuse.spec import Captured

__all__ = ["Listing", "Mask"]

#: Key tiles that one program looks at: by their ranges together, score by score one after the other.
RANGED, EVALUATED = 16, 4
#: Keys whose scores are looked at together.
SLICE = 32
WARPS = 4


@dataclass(frozen=True, repr=False)
class Mask:
    """What a listing's body knows when it is compiled: the mask, its tiles, the sides on which a band closes it.

    ``symbols`` are the sizes that the mask reads; ``everywhere`` says that a row which keeps nothing sees every key.
    """

    program: Expr
    captures: tuple[Captured, ...]
    symbols: int
    wide: bool
    height: int
    width: int
    tiles: int
    left: bool
    right: bool
    everywhere: bool

    @property
    def part(self) -> int:
        """Key tiles that one program looks at."""
        return RANGED if self.ranged else EVALUATED

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """How each capture is read for ranges: for the ``"row"``s, the ``"key"``s, ``"one"`` value, or not."""
        used = {part.slot for part in walk(self.program) if isinstance(part, Capture)}
        return tuple(_read(each) if slot in used else "" for slot, each in enumerate(self.captures))

    @cached_property
    def bounds(self) -> Bounds:
        """What ranges tell of a tile, as programs of them: after the symbols two for each capture, for m and for n."""
        return bounds_of(self.program, self._range)

    def _range(self, variable: Capture | Index | Symbol) -> tuple[Expr, Expr] | None:
        place = self.symbols
        match variable:
            case Capture(slot):
                if self.captures[slot].kind == "float" or not self.reads[slot]:
                    return None
                place += 2 * slot
            case Index("m" | "n" as axis):
                place += 2 * len(self.captures) + 2 * (axis == "n")
            case _:
                return variable, variable
        return Symbol(place), Symbol(place + 1)

    @cached_property
    def ranged(self) -> bool:
        """Whether ranges tell anything: not of a mask that is read score by score."""
        return self.bounds.some != Const(True) and self.bounds.every != Const(False)

    @cached_property
    def some(self) -> Any:
        """Whether a tile may keep something, as a jit function."""
        return self._function(self.bounds.some)

    @cached_property
    def every(self) -> Any:
        """Whether a tile keeps everything."""
        return self._function(self.bounds.every)

    @cached_property
    def loaders(self) -> tuple[Any, ...]:
        """What loads each capture."""
        return tuple(self._function(Capture(slot)) for slot in range(len(self.captures)))

    @property
    def padded_height(self) -> int:
        """The power of two that the rows of a tile are computed as."""
        return 1 << (self.height - 1).bit_length()

    @property
    def slice(self) -> int:
        """Keys that are looked at together."""
        return min(self.width, SLICE)

    @property
    def padded_tiles(self) -> int:
        """The power of two that the key tiles of a list are computed as."""
        return 1 << (self.tiles - 1).bit_length()

    @cached_property
    def keep(self) -> Any:
        """The mask as a jit function."""
        return self._function(self.program)

    def _function(self, program: Expr) -> Any:
        # Triton is there when a kernel is launched, not before
        from attnfuse.kernels.triton.program import jit_function  # noqa: PLC0415

        return jit_function(program, self.captures, wide=self.wide)

    @cached_property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows the mask by: its numbers, and its programs' texts."""
        numbers = (self.height, self.width, self.tiles, self.left, self.right, self.everywhere, self.part, self.reads)
        programs = (self.program, self.bounds.some, self.bounds.every)
        texts = [function_text(each, self.captures, wide=self.wide) for each in programs]
        return "mask_" + hashlib.sha256(repr((numbers, texts)).encode()).hexdigest()[:24]

    # Triton makes names of functions and of cache entries from a constant's text
    def __repr__(self) -> str:
        return self.cache_key


def _read(captured: Captured) -> str:
    match ("m" in captured.axes, "n" in captured.axes):
        case (True, True):
            return ""
        case (True, False):
            return "row"
        case (False, True):
            return "key"
    return "one"


@dataclass(frozen=True)
class Listing:
    """The launch that lists the tiles of a mask, for operands of these sizes; ``batch`` and ``heads`` it varies along.

    ``band`` are the offsets of the band that the mask has beside ``mask.program``; ``strides`` and ``symbols`` what
    the program reads.
    """

    mask: Mask
    batch: int
    heads: int
    rows: int
    keys: int
    band: tuple[int, int]
    strides: tuple[int, ...]
    symbols: tuple[int, ...]

    @property
    def row_tiles(self) -> int:
        """Lists of one batch and head."""
        return -(-self.rows // self.mask.height)

    @property
    def length(self) -> int:
        """Numbers of a list: how many, every key tile, and one that may be read ahead."""
        return -(-self.keys // self.mask.width) + 2

    @cached_property
    def fixed(self) -> bool:
        """Whether the lists depend on sizes alone."""
        return not any(isinstance(part, Capture) for part in walk(self.mask.program))

    def launcher(self, device: torch.device) -> Callable[[Sequence[Tensor]], Tensor]:
        """What makes ``lists [batch, heads, row tiles, length]``, int32, of captures that are aligned to 16 bytes."""
        from attnfuse.kernels.triton.tiles import list_tiles  # noqa: PLC0415 - see Mask.keep

        shape = (2, self.batch, self.heads, self.row_tiles, self.length)
        count = self.batch * self.heads * self.row_tiles
        grid = (self.batch * self.heads, self.row_tiles, -(-(self.length - 2) // self.mask.part))
        sizes = (self.rows, self.keys, *self.band, self.length)
        compiled: Any = None

        def run(captures: Sequence[Tensor]) -> Tensor:
            nonlocal compiled
            lists, kinds = torch.empty(shape, dtype=torch.int32, device=device).unbind()
            scope = tuple(captures), self.strides, self.symbols
            arguments = (lists, kinds, _arrivals(device, count), scope, self.heads, sizes, self.mask)
            if compiled is None:
                compiled = list_tiles[grid](*arguments, num_warps=WARPS)
            else:
                # the arguments' types, and what divides them, do not change: Triton need not look again
                compiled[grid](*arguments)
            return lists

        return run


_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(device: torch.device, count: int) -> Tensor:
    """So many zeros, of each stream its own; zero again after each launch."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _ARRIVALS.get((device, stream))
    if found is None or found.numel() < count:
        found = _ARRIVALS[device, stream] = torch.zeros(count, dtype=torch.int32, device=device)
    return found
