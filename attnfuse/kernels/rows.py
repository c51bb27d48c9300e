"""What a mask says about whole rows: which keys a block of rows can keep, and whether every row keeps one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attnfuse.features import Causal, Feature, Window, mask_features
from attnfuse.form import ABSORBING, Mask, form_of, masked_by
from attnfuse.score import Apply, Capture, Const, Expr, Index, S, Symbol, parted, walk
from attnfuse.spec import AttentionSpec, Captured

__all__ = [
    "FILL",
    "MARGIN",
    "Band",
    "band_of",
    "beside_band",
    "masking_band",
    "masking_fill",
    "rows_kept",
    "skips_surely",
]

#: A fill at or below this masks; a higher one is taken for a score.
FILL = -1e4
#: Some summands above this do not reach a fill that :data:`attnfuse.form.ABSORBING` names.
LOW = -1e20
#: ``exp(-MARGIN)`` is zero, in float64 too.
MARGIN = 1000.0

_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
}


@dataclass(frozen=True)
class Band:
    """Row ``m`` keeps at most keys ``m + left <= n <= m + right``; None where that side is open.

    ``exact`` says that the mask is nothing but this band: a key inside is kept.
    """

    left: int | None = None
    right: int | None = None
    exact: bool = True

    @property
    def open(self) -> bool:
        """Whether every key is inside."""
        return self.left is None and self.right is None

    @property
    def holds_diagonal(self) -> bool:
        """Whether key ``m`` is inside for row ``m``."""
        return (self.left is None or self.left <= 0) and (self.right is None or self.right >= 0)

    def reach(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """The keys that any row in ``first..last-1`` can keep, as a span; at least one key when there are any."""
        start = 0 if self.left is None else min(max(first + self.left, 0), max(keys - 1, 0))
        stop = keys if self.right is None else min(max(last + self.right, 0), keys)
        return start, max(stop, min(start + 1, keys))

    def core(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """The keys inside the band of every row in ``first..last-1``, as a span; empty spans start where they stop."""
        start = 0 if self.left is None else min(max(last - 1 + self.left, 0), keys)
        stop = keys if self.right is None else min(max(first + self.right + 1, 0), keys)
        return start, max(start, stop)

    def share(self, rows: int, keys: int, tile: int) -> float:
        """The share of scores in tiles of so many rows that the band does not skip."""
        if self.open or not rows * keys:
            return 1.0
        spans = ((first, min(first + tile, rows)) for first in range(0, rows, tile))
        reached = ((last - first, self.reach(first, last, keys)) for first, last in spans)
        return sum((stop - start) * height for height, (start, stop) in reached) / (rows * keys)


@lru_cache(maxsize=1024)
def band_of(spec: AttentionSpec, symbols: tuple[int, ...] = ()) -> Band:
    """The band of a spec's mask, its sizes being ``symbols``; an open band where it has none."""
    mask = masked_by(spec)
    if mask is None:
        return Band(exact=form_of(spec.score) is not None or spec.normaliser == "none")
    return _band(mask, spec.captures, symbols)


def _band(mask: Mask, captures: tuple[Captured, ...], symbols: tuple[int, ...]) -> Band:
    found = mask_features(mask, captures)
    edges = [(type(f), _number(f.offset, symbols)) for f in found if _is_edge(f) and isinstance(f, (Causal, Window))]
    left = [offset for edge, offset in edges if edge is Window and offset is not None]
    right = [offset for edge, offset in edges if edge is Causal and offset is not None]
    exact = len(left) + len(right) == len(mask.keep)
    return Band(max(left, default=None), min(right, default=None), exact)


def _is_edge(feature: Feature) -> bool:
    """Whether a part of a mask is an edge of its band: not where its offset is captured, or differs by batch."""
    if not isinstance(feature, (Causal, Window)):
        return False
    parts = walk(feature.offset)
    return all(isinstance(part, (Const, Symbol)) or getattr(part, "op", None) in _ARITHMETIC for part in parts)


def beside_band(mask: Mask, captures: tuple[Captured, ...]) -> tuple[Expr, ...]:
    """The conjuncts of a mask that are no edge of its band."""
    named = zip(mask.keep, mask_features(mask, captures), strict=True)
    return tuple(keep for keep, name in named if not _is_edge(name))


def masking_fill(spec: AttentionSpec) -> float | None:
    """The logit of a masked key, where the key may be left out for it; None where nothing is masked so."""
    mask = masked_by(spec)
    return mask.fill if mask is not None and (mask.fill <= FILL or spec.normaliser == "none") else None


def masking_band(spec: AttentionSpec, symbols: tuple[int, ...] = ()) -> Band:
    """The band of a mask behind which keys have weight zero, in rows that keep a key; open where there is none."""
    return Band(exact=False) if masking_fill(spec) is None else band_of(spec, symbols)


def skips_surely(
    spec: AttentionSpec, rows: int, keys: int, symbols: Sequence[int] = (), *, training: bool = False
) -> bool:
    """Whether leaving out keys outside of :func:`masking_band` is right even without looking at the logits.

    A row that keeps no key is NaN, with or without the keys behind -inf, but their values' gradients
    are NaN too, unless there is a sink or empty rows are zero. Behind a finite fill such a row weighs *all*
    keys equally. Without a softmax a masked key weighs nothing whatever the others do.
    """
    fill = masking_fill(spec)
    if fill is None or spec.normaliser == "none":
        return True
    harmless = spec.sink is not None or spec.empty_rows == "zero" or not training
    return (fill == float("-inf") and harmless) or (fill <= ABSORBING and rows_kept(spec, rows, keys, symbols))


def rows_kept(spec: AttentionSpec, rows: int, keys: int, symbols: Sequence[int] = ()) -> bool:
    """Whether every query row is proven to have a logit that no mask has made, for finite scores.

    Proven for masks that are a band, those among the biases included, without captured biases (which may hold -inf) but
    for slopes, times the distance of row and key: that is zero or NaN where they meet. A band's width is concave in the
    row, so its first and last row decide. Symbolic sizes count at the values given. Without a softmax no row needs a
    key.
    """
    if spec.normaliser == "none":
        return True
    form = form_of(spec.score)
    if form is None or keys == 0 or _captured(form.scale):
        return False
    masks = [each for each in map(_mask_of, form.bias) if each is not None]
    keep = (*form.keep, *(conjunct for mask in masks for conjunct in mask.keep))
    band = _band(Mask(keep, form.fill, S), spec.captures, tuple(symbols))
    if not band.exact:
        return False
    low = [bias for bias in form.bias if _mask_of(bias) is None and _may_be_low(bias)]
    if low and not (rows <= keys and band.holds_diagonal and all(map(_vanishes, low))):
        return False
    return all(_width(band, row, keys) > 0 for row in (0, rows - 1)) if rows else True


def _mask_of(bias: Expr) -> Mask | None:
    """The mask that a summand is; None where it is none."""
    match bias:
        case Apply("where", (keep, Const(0.0), Const(fill))) if fill <= LOW:
            return Mask(tuple(parted("and", keep)), float(fill), S)
    return None


def _may_be_low(bias: Expr) -> bool:
    """Whether a summand may be as low as what masks: it is captured, has such a number, or a pole."""
    return any(map(_is_boundless, walk(bias)))


def _is_boundless(part: Expr) -> bool:
    match part:
        case Capture() | Apply("log" | "log1p" | "reciprocal" | "rsqrt"):
            return True
        case Const(value):
            return not abs(value) < -LOW
        case Apply("div", (_, divisor)):
            return not isinstance(divisor, Const) or divisor.value == 0
    return False


def _width(band: Band, row: int, keys: int) -> int:
    start = 0 if band.left is None else max(row + band.left, 0)
    stop = keys if band.right is None else min(row + band.right + 1, keys)
    return stop - start


def _captured(program: Expr) -> bool:
    return any(isinstance(part, Capture) for part in walk(program))


def _vanishes(program: Expr) -> bool:
    """Whether it is zero, or NaN, where ``n == m``."""
    match program:
        case Apply("sub", (Index("m"), Index("n")) | (Index("n"), Index("m"))):
            return True
        case Apply("neg" | "abs" | "float" | "div", (inner, *_)):
            return _vanishes(inner)
        case Apply("mul", (left, right)):
            return _vanishes(left) or _vanishes(right)
    return False


def _number(program: Expr, symbols: tuple[int, ...]) -> int | None:
    """The value of an integer program of constants and sizes; None where it is anything else."""
    match program:
        case Const(int() as value):
            return int(value)
        case Symbol(slot) if slot < len(symbols):
            return symbols[slot]
        case Apply(op, args) if op in _ARITHMETIC:
            numbers = [_number(arg, symbols) for arg in args]
            known = [number for number in numbers if number is not None]
            return int(_ARITHMETIC[op](*known)) if len(known) == len(args) else None
    return None
