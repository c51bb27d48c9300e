"""Which choices are fast: measured on one H200 (NOTES.md says how), or by ``attnfuse tune`` on the device there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.measured import fastest_schedule
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["BLOCKS", "NAME", "WIDEST_FLOAT8", "block_of", "choices", "measured", "tuned"]

#: What the kernel is called.
NAME = "gluon"

#: Widths of a tile; a head's is rounded up, and what is beyond it reads as zero.
BLOCKS = (64, 128, 256)

#: By the widths of query and value tiles, with registers for any program.
_WITH_PROGRAM: dict[tuple[int, int], Meta] = {
    (64, 64): Meta(64, 64, stages=3),
    (64, 128): Meta(64, 128),
    (64, 256): Meta(64, 256, block_n=64),
    (128, 64): Meta(128, 64),
    (128, 128): Meta(128, 128, held=False, queries=2, partial_sums=True),
    (128, 256): Meta(128, 256, block_n=64),
    (256, 64): Meta(256, 64, block_n=64),
    (256, 128): Meta(256, 128, block_n=64),
    (256, 256): Meta(256, 256, block_n=64, held=False, shared_out=True, own=True, partial_sums=True),
}
#: A panel needs the room of the second query and of the output.
_PANEL_128 = Meta(128, 128, held=False, shared_out=True, own=True)
#: 192 rows to a block read a third fewer bytes than 128, and mask more scores behind a causal mask.
_THREE_64 = Meta(64, 64, consumers=3, registers=160, stages=3, held=False, queries=2, own=True, turns=True)
_THREE_128 = Meta(128, 128, consumers=3, registers=160, overlapped=False, shared_out=True, queries=2)
_TWO_128 = Meta(128, 128, held=False, queries=2)
#: Blocks of half the keys mask fewer scores, and of short rows they are many.
_SHORT_CAUSAL_128 = Meta(128, 128, block_n=64, stages=4, held=False, queries=2, own=True, partial_sums=True)
_SHORT, _LONG, _LONG_CAUSAL = 768, 4096, 8192

#: Of float8 products take half as long, and three consumers in turn keep the exponents going best.
_FLOAT8 = Meta(
    64, 64, stages=3, consumers=3, registers=160, overlapped=False, held=False, queries=2, own=True, partial_sums=True
)
#: A program that reads along the keys needs the registers of two.
_FLOAT8_TWO = replace(_FLOAT8, stages=4, consumers=2, registers=240)
#: What else may be the fastest.
_FLOAT8_OTHERS = (
    _FLOAT8, replace(_FLOAT8, turns=True), _FLOAT8_TWO, replace(_FLOAT8_TWO, overlapped=True, held=True),
    replace(_FLOAT8_TWO, block_n=256, stages=2),
)  # fmt: skip
_FACTS = ("left", "right", "program", "panel", "columns")
#: The widest tile of float8: a tile's output is summed apart, in registers of its own.
WIDEST_FLOAT8 = 128


def tuned(
    width: int,
    value_width: int,
    keys: int,
    *,
    left: bool,
    right: bool,
    program: bool = False,
    panel: bool = False,
    columns: bool = False,
    narrow: bool = False,
) -> Meta:
    """The choices for heads of these widths, up to 256, behind a band that is open or closed on either side.

    ``program`` says that scores pass through one, which needs registers; ``panel`` that it reads one; ``columns`` that
    it varies along the keys; ``narrow`` that operands are float8.
    """
    blocks = block_of(width), block_of(value_width)
    longest_first = right and not left
    if narrow:
        chosen = _FLOAT8_TWO if columns else replace(_FLOAT8, turns=not (program or left or right))
        return _sized(chosen, blocks, right=right, longest_first=longest_first)
    meta = _with_program(blocks, panel) if program else _plain(blocks, keys, right=right, triangle=longest_first)
    if blocks == (256, 256):
        # long blocks: the hardware's own order is the best
        return replace(meta, persistent=False, longest_first=longest_first)
    three = blocks == (64, 64) and not program
    return replace(meta, dynamic=right or three, longest_first=longest_first, short_last=three and not longest_first)


def choices(width: int, value_width: int, *, narrow: bool = False) -> tuple[Meta, ...]:
    """Everything that :func:`tuned` may answer for heads of these widths, and of float8 what it might."""
    lengths = (0, _SHORT, _LONG, _LONG_CAUSAL)
    facts = [dict(zip(_FACTS, each, strict=True)) for each in product((False, True), repeat=len(_FACTS))]
    found = [tuned(width, value_width, keys, narrow=narrow, **each) for keys, each in product(lengths, facts)]
    blocks, others = (block_of(width), block_of(value_width)), product(_FLOAT8_OTHERS if narrow else (), (False, True))
    found += [_sized(each, blocks, right=right, longest_first=right) for each, right in others]
    return tuple(dict.fromkeys(found))


def measured(
    spec: AttentionSpec, dtype: torch.dtype, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> Meta | None:
    """The choices that were measured as the fastest on this machine's device; None where none were."""
    fields = fastest_schedule(NAME, spec, dtype, query, key, value, Target("cuda", "sm90"))
    return None if fields is None else Meta(**fields)


def _sized(meta: Meta, blocks: tuple[int, int], *, right: bool, longest_first: bool) -> Meta:
    return replace(meta, head_block=blocks[0], value_block=blocks[1], dynamic=right, longest_first=longest_first)


def _with_program(blocks: tuple[int, int], panel: bool) -> Meta:
    return _PANEL_128 if panel and blocks == (128, 128) else _WITH_PROGRAM[blocks]


def _plain(blocks: tuple[int, int], keys: int, *, right: bool, triangle: bool) -> Meta:
    match blocks:
        case (64, 64):
            short_causal = right and keys < _LONG_CAUSAL
            in_turn = replace(_THREE_64, overlapped=False, turns=False, partial_sums=True)
            return in_turn if short_causal else replace(_THREE_64, turns=not right)
        case (128, 128) if right and keys < _SHORT:
            return _SHORT_CAUSAL_128
        case (128, 128) if right:
            three = triangle and keys >= _LONG_CAUSAL
            return replace(_THREE_128, queries=1, own=True, partial_sums=True) if three else _TWO_128
        case (128, 128):
            return _THREE_128 if keys >= _LONG else _TWO_128
    return _WITH_PROGRAM[blocks]


def block_of(width: int) -> int:
    """The width of the tile of heads of so many numbers."""
    return next(block for block in BLOCKS if width <= block)
