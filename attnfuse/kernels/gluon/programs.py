"""Which programs a body runs: in tiles that the mask cuts, in whole ones, and what lists the tiles of a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnfuse.form import ABSORBING, masked_by, weight_factor
from attnfuse.kernels.rows import Band, band_of, beside_band, rows_kept
from attnfuse.kernels.triton import logit_of
from attnfuse.score import Const, Expr, P, joined, walk
from attnfuse.spec import AttentionSpec

__all__ = ["Programs", "mask_of", "programs_of"]

#: Logits beyond this lose more than 0.01 where ``s * scale - top * scale`` rounds one product and not the other.
LARGE = 1e5


@dataclass(frozen=True)
class Programs:
    """``cut`` and ``bare`` make logits of scores, ``sink`` one of a row, in units of ``exponent``, a power of two.

    Rows of the output are multiplied by ``factor``, None for one. Keys outside of ``band`` are not read. ``mask`` says
    which others have a weight: None where they all have, or where it is not worth asking. ``everywhere``: where a row
    keeps nothing, all of its keys have.
    """

    cut: Expr
    bare: Expr
    sink: Expr | None
    factor: Expr | None
    exponent: float
    huge: bool
    band: Band
    mask: Expr | None
    everywhere: bool


def programs_of(spec: AttentionSpec, rows: int, keys: int, symbols: tuple[int, ...]) -> Programs:
    """The programs of a spec for so many rows and keys."""
    skips = _skips(spec, rows, keys, symbols)
    logit = logit_of(_unfilled(spec) if skips else spec)
    cut = logit.core if skips else logit.masked
    mask = mask_of(spec, banded=skips)
    return Programs(
        cut,
        cut if mask is None else logit.bare,
        None if spec.sink is None else logit.shrunk(spec.sink, spec.captures),
        None if spec.weight == P else weight_factor(spec.weight),
        logit.exponent,
        logit.huge or _is_large(cut),
        band_of(spec, symbols) if skips else Band(exact=False),
        mask,
        not skips,
    )


def _skips(spec: AttentionSpec, rows: int, keys: int, symbols: tuple[int, ...]) -> bool:
    """Whether keys outside of the mask's band have no weight, so that they need not be read.

    A finite fill gives them weight in a row that keeps no key at all.
    """
    mask = masked_by(spec)
    if mask is None or mask.fill == float("-inf"):
        return True
    return mask.fill <= ABSORBING and rows_kept(spec, rows, keys, symbols)


def mask_of(spec: AttentionSpec, *, banded: bool) -> Expr | None:
    """What decides of a key beside the band, or with it where the band is not left out; None where nothing does."""
    mask = masked_by(spec)
    if mask is None or mask.fill > ABSORBING:
        return None
    beside = beside_band(mask, spec.captures)
    return joined("and", beside if banded else mask.keep) if beside else None


def _unfilled(spec: AttentionSpec) -> AttentionSpec:
    """With -inf for a finite fill that nobody sees: the logit is then not as large as the fill."""
    mask = masked_by(spec)
    if mask is None:
        return spec
    return replace(spec, score=replace(mask, fill=float("-inf"), added=False).expr())


def _is_large(program: Expr) -> bool:
    """Whether it fills masked keys with a finite number so large that its product with a factor must not be rounded."""
    return any(isinstance(part, Const) and LARGE < abs(part.value) < float("inf") for part in walk(program))
