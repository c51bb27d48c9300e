"""The row tiles that a mask keeps of each key tile: the lists of the mask turned round."""

from __future__ import annotations

from collections.abc import Sequence

from attnfuse.kernels.gluon.backward_meta import BackwardMeta
from attnfuse.kernels.triton import Listing, Mask
from attnfuse.score import Expr, Index, rewrite
from attnfuse.spec import AttentionSpec, Captured, axes_of

__all__ = ["row_tiles_of", "turned"]

_OTHER = {"m": "n", "n": "m"}


def row_tiles_of(
    mask: Expr,
    spec: AttentionSpec,
    meta: BackwardMeta,
    shape: Sequence[int],
    keys: int,
    band: tuple[int, int],
    strides: tuple[int, ...],
    symbols: tuple[int, ...],
    *,
    wide: bool,
) -> Listing:
    """What lists them, for a query of ``shape`` ``[B, H, M, D]``; ``band`` are the offsets of the mask's band."""
    batch, heads, rows, _ = shape
    varies = axes_of(mask, spec.captures)
    captures = tuple(Captured(tuple(_OTHER.get(axis, axis) for axis in x.axes), x.dtype) for x in spec.captures)
    asked = Mask(
        turned(mask), captures, len(symbols), wide, meta.block_n, meta.block_m, -(-rows // meta.block_m),
        left=meta.right, right=meta.left, everywhere=False,
    )  # fmt: skip
    left, right = band
    sizes = batch if "b0" in varies else 1, heads if "h" in varies else 1, keys, rows
    return Listing(asked, *sizes, (-right, -left), strides, symbols)


def turned(program: Expr) -> Expr:
    """The program of keys and rows: each is the other's index."""

    def rule(part: Expr) -> Expr:
        return Index(_OTHER[part.axis]) if isinstance(part, Index) and part.axis in _OTHER else part

    return rewrite(program, rule)
