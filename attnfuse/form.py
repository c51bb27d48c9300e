"""The names people give to parts of a score program: scale, softcap, bias, causal, window, padding...

The canonical program is ``where(keep, softcap(scale * s) + bias, fill)``, or for a finite fill that the source
adds, ``softcap(scale * s) + bias + where(keep, 0.0, fill)``; :class:`Form` is that shape as data. The two have the
same value, but in a row that keeps nothing only the second has a gradient. Most attention has a form; a program
without one is still attention, only unnamed. ``form_of(form.expr()) == form`` for every form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from attnfuse.score import Apply, Capture, Const, Expr, Index, P, S, Score, apply, text, walk
from attnfuse.spec import AttentionSpec, Captured, axes_of

__all__ = [
    "ABSORBING",
    "Alibi",
    "Bias",
    "Causal",
    "Document",
    "Feature",
    "Form",
    "Mask",
    "Padding",
    "Predicate",
    "Scale",
    "Sink",
    "Softcap",
    "Window",
    "features",
    "form_of",
    "masked_by",
]

ONE = Const(1.0)

#: A finite fill at or below this swallows any score it is added to: float32 has 24 bits, so every
#: score smaller than 5e22 in magnitude disappears in the sum. ``-1e9`` and ``-1e4`` do not.
ABSORBING = -1e30


@dataclass(frozen=True)
class Form:
    """``where(keep, softcap(scale * s) + bias, fill)``, each part optional; the mask is a summand where ``added``.

    ``scale`` is a number or a program free of ``s`` (a captured scale); ``softcap`` is the cap ``c`` of
    ``c * tanh(x / c)``; ``bias`` are the summands added after it; ``keep`` are the conjuncts of the mask
    (empty: every key is kept) and ``fill`` the logit of a key that is not kept. An ``added`` fill is at most
    :data:`ABSORBING`; a higher one does not replace the score and counts as a bias.
    """

    scale: Expr = ONE
    softcap: float | None = None
    bias: tuple[Expr, ...] = ()
    keep: tuple[Expr, ...] = ()
    fill: float = float("-inf")
    added: bool = False

    def expr(self) -> Expr:
        """The program, in the spelling that simplify brings every program to."""
        out: Expr = S if self.scale == Const(1.0) else apply("mul", self.scale, S)
        if self.softcap is not None:
            cap = Const(self.softcap)
            out = apply("mul", cap, apply("tanh", apply("div", out, cap)))
        for summand in self.bias:
            out = apply("add", out, summand)
        if self.keep:
            mask = self.keep[0]
            for conjunct in self.keep[1:]:
                mask = apply("and", mask, conjunct)
            if self.added:
                return apply("add", out, apply("where", mask, Const(0.0), Const(self.fill)))
            return apply("where", mask, out, Const(self.fill))
        return out


@lru_cache(maxsize=1024)
def form_of(score: Expr) -> Form | None:
    """The form of a canonical score program; None when it has none."""
    keep: tuple[Expr, ...] = ()
    fill, added = float("-inf"), False
    match score:
        case Apply("where", (mask, inner, Const(value))) if not _reads_score(mask):
            keep, fill, score = tuple(_conjuncts(mask)), float(value), inner
        case Apply("add", (inner, Apply("where", (mask, Const(0.0), Const(value))))) if value <= ABSORBING:
            keep, fill, score, added = tuple(_conjuncts(mask)), float(value), inner, True
    bias, score = _split_bias(score)
    softcap: float | None = None
    match score:
        case Apply("mul", (Const(cap), Apply("tanh", (Apply("div", (inner, Const(divisor))),)))) if cap == divisor:
            softcap, score = float(cap), inner
    match score:
        case Score():
            return Form(ONE, softcap, bias, keep, fill, added)
        case Apply("mul", (scale, Score())) if not _reads_score(scale):
            return Form(scale, softcap, bias, keep, fill, added)
    return None


@dataclass(frozen=True)
class Mask:
    """The conjuncts that a key must meet to be kept, and the logit that it has elsewhere."""

    keep: tuple[Expr, ...]
    fill: float

    def features(self, captures: tuple[Captured, ...]) -> tuple[Feature, ...]:
        """What the conjuncts are called."""
        return tuple(_name_mask(conjunct, captures) for conjunct in self.keep)


def masked_by(spec: AttentionSpec) -> Mask | None:
    """The mask of a spec, whatever its program does with the keys that are kept; None when it has none.

    Without a softmax only a key of weight zero is masked.
    """
    match spec.score:
        case Apply("where", (mask, _, Const(value))) if not _reads_score(mask):
            if spec.normaliser == "none" and (value != 0 or spec.weight != P):
                return None
            return Mask(tuple(_conjuncts(mask)), float(value))
    form = form_of(spec.score)
    return None if form is None or not form.keep else Mask(form.keep, form.fill)


def _reads_score(expr: Expr) -> bool:
    return any(isinstance(part, Score) for part in walk(expr))


def _conjuncts(mask: Expr) -> Iterator[Expr]:
    match mask:
        case Apply("and", (left, right)):
            yield from _conjuncts(left)
            yield from _conjuncts(right)
        case _:
            yield mask


def _split_bias(score: Expr) -> tuple[tuple[Expr, ...], Expr]:
    match score:
        case Apply("add", (inner, summand)) if not _reads_score(summand):
            outer, base = _split_bias(inner)
            return (*outer, summand), base
    return (), score


# --- names ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """A factor on the raw score: a number or a captured tensor."""

    value: Expr


@dataclass(frozen=True)
class Softcap:
    """``cap * tanh(score / cap)``."""

    cap: float


@dataclass(frozen=True)
class Bias:
    """A captured summand."""

    value: Expr


@dataclass(frozen=True)
class Alibi:
    """A bias that is a slope times an index."""

    value: Expr


@dataclass(frozen=True)
class Causal:
    """Key ``n`` is kept when ``n <= m + offset``; offset 0 is top-left, ``N - M`` bottom-right."""

    offset: Expr


@dataclass(frozen=True)
class Window:
    """Key ``n`` is kept when ``n >= m + offset``: the left edge of a sliding window."""

    offset: Expr


@dataclass(frozen=True)
class Padding:
    """A mask that does not vary along the query rows."""

    keep: Expr


@dataclass(frozen=True)
class Document:
    """Row and key must carry the same id."""

    keep: Expr


@dataclass(frozen=True)
class Predicate:
    """Any other mask."""

    keep: Expr


@dataclass(frozen=True)
class Sink:
    """A logit that takes weight and gives no value."""

    value: Expr


Feature = Scale | Softcap | Bias | Alibi | Causal | Window | Padding | Document | Predicate | Sink


def features(spec: AttentionSpec) -> tuple[Feature, ...] | None:
    """What the spec's parts are called, in the order they act; None when the program has no form."""
    form = form_of(spec.score)
    if form is None:
        return None
    found: list[Feature] = []
    if form.scale != Const(1.0):
        found.append(Scale(form.scale))
    if form.softcap is not None:
        found.append(Softcap(form.softcap))
    found += [_name_bias(summand) for summand in form.bias]
    found += [_name_mask(conjunct, spec.captures) for conjunct in form.keep]
    if spec.sink is not None:
        found.append(Sink(spec.sink))
    return tuple(found)


def _name_bias(summand: Expr) -> Feature:
    parts = list(walk(summand))
    indexed = any(isinstance(part, Index) and part.axis in ("m", "n") for part in parts)
    chosen = any(isinstance(part, Apply) and part.op == "where" for part in parts)
    return Alibi(summand) if indexed and not chosen else Bias(summand)


def _name_mask(keep: Expr, captures: tuple[Captured, ...]) -> Feature:
    match keep:
        case Apply("le", (Index("n"), bound)):
            if (offset := _row_offset(bound)) is not None:
                return Causal(offset)
        case Apply("ge", (Index("n"), bound)):
            if (offset := _row_offset(bound)) is not None:
                return Window(offset)
        case Apply("eq", (Capture(left), Capture(right))):
            if {captures[left].axes[-1:], captures[right].axes[-1:]} == {("m",), ("n",)}:
                return Document(keep)
    return Predicate(keep) if "m" in axes_of(keep, captures) else Padding(keep)


def _row_offset(bound: Expr) -> Expr | None:
    match bound:
        case Index("m"):
            return Const(0)
        case Apply("add", (Index("m"), offset)) if not any(isinstance(part, Index) for part in walk(offset)):
            return offset
        case Apply("sub", (Index("m"), Const(offset))):
            return Const(-offset)
    return None


def describe(spec: AttentionSpec) -> str:
    """A few words for a report: ``scale 0.125, causal, padding``."""
    found, mask = features(spec), masked_by(spec)
    words = ["no softmax"] if spec.normaliser == "none" else []
    if found is None:
        words.append("program")
        found = () if mask is None else mask.features(spec.captures)
    words += map(_word, found)
    if spec.empty_rows == "zero":
        words.append("empty rows zero")
    if spec.dropout:
        words.append(f"dropout {spec.dropout:g}")
    return ", ".join(words) or "plain"


def _word(feature: Feature) -> str:
    match feature:
        case Scale(Const(value)):
            return f"scale {value:g}"
        case Softcap(cap):
            return f"softcap {cap:g}"
        case Causal(Const(0)):
            return "causal"
        case Causal(offset) | Window(offset):
            return f"{type(feature).__name__.lower()} {text(offset)}"
    return type(feature).__name__.lower()
