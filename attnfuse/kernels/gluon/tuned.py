"""Which choices are fast: measured on one H200 (NOTES.md says how), or by ``attnfuse tune`` on the device there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.measured import fastest_schedule
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["BLOCKS", "NAME", "choices", "measured", "tuned"]

#: What the kernel is called.
NAME = "gluon"

#: Widths of a tile; a head's is rounded up, and what is beyond it reads as zero.
BLOCKS = (64, 128, 256)

#: By the widths of query and value tiles, with registers for any program and room for a panel.
_WITH_PROGRAM: dict[tuple[int, int], Meta] = {
    (64, 64): Meta(64, 64, stages=3),
    (64, 128): Meta(64, 128),
    (64, 256): Meta(64, 256, block_n=64),
    (128, 64): Meta(128, 64),
    (128, 128): Meta(128, 128, shared_out=True),
    (128, 256): Meta(128, 256, block_n=64),
    (256, 64): Meta(256, 64, block_n=64),
    (256, 128): Meta(256, 128, block_n=64),
    (256, 256): Meta(256, 256, block_n=64, held=False, shared_out=True),
}
#: 192 rows to a block read a third fewer bytes than 128, and mask more scores behind a causal mask.
_THREE_64 = Meta(64, 64, consumers=3, registers=160, stages=3, held=False)
_THREE_128 = Meta(128, 128, consumers=3, registers=160, overlapped=False, shared_out=True)
_LONG, _LONG_CAUSAL = 4096, 12288


def tuned(width: int, value_width: int, keys: int, *, left: bool, right: bool, program: bool) -> Meta:
    """The choices for heads of these widths, up to 256, behind a band that is open or closed on either side.

    ``program`` says that scores pass through one, which needs registers.
    """
    blocks = _block(width), _block(value_width)
    meta = _WITH_PROGRAM[blocks] if program else _plain(blocks, keys, right)
    if blocks == (256, 256):
        # long blocks: the hardware's own order is the best
        return replace(meta, persistent=False, longest_first=right and not left)
    return replace(meta, dynamic=right or blocks == (64, 64), longest_first=right and not left)


def choices(width: int, value_width: int) -> tuple[Meta, ...]:
    """Everything that :func:`tuned` may answer for heads of these widths."""
    facts = product((0, _LONG, _LONG_CAUSAL), (False, True), (False, True), (False, True))
    return tuple(
        dict.fromkeys(
            tuned(width, value_width, keys, left=left, right=right, program=program)
            for keys, left, right, program in facts
        )
    )


def measured(
    spec: AttentionSpec, dtype: torch.dtype, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> Meta | None:
    """The choices that were measured as the fastest on this machine's device; None where none were."""
    fields = fastest_schedule(NAME, spec, dtype, query, key, value, Target("cuda", "sm90"))
    return None if fields is None else Meta(**fields)


def _plain(blocks: tuple[int, int], keys: int, right: bool) -> Meta:
    long = keys >= (_LONG_CAUSAL if right else _LONG)
    match blocks:
        case (64, 64):
            return _THREE_64 if long or not right else replace(_THREE_64, overlapped=False)
        case (128, 128):
            return _THREE_128 if long else Meta(128, 128, held=False)
    return _WITH_PROGRAM[blocks]


def _block(width: int) -> int:
    return next(block for block in BLOCKS if width <= block)
