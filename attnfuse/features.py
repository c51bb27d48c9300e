"""The names people give to parts of a spec: scale, softcap, bias, ALiBi, causal, window, padding, document, sink."""

from __future__ import annotations

from dataclasses import dataclass

from attnfuse.form import Mask, form_of, masked_by
from attnfuse.score import Apply, Capture, Const, Expr, Index, text, walk
from attnfuse.spec import AttentionSpec, Captured, axes_of

__all__ = [
    "Alibi",
    "Bias",
    "Causal",
    "Document",
    "Feature",
    "Padding",
    "Predicate",
    "Scale",
    "Sink",
    "Softcap",
    "Window",
    "describe",
    "features",
    "mask_features",
]


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


def mask_features(mask: Mask, captures: tuple[Captured, ...]) -> tuple[Feature, ...]:
    """What the conjuncts of a mask are called."""
    return tuple(_name_mask(conjunct, captures) for conjunct in mask.keep)


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
        found = () if mask is None else mask_features(mask, spec.captures)
    words += map(_word, found)
    if spec.empty_rows == "zero":
        words.append("empty rows zero")
    if spec.dropout:
        words.append(f"dropout {spec.dropout:g}")
    words += ["float8 values"] if spec.out_dtype else []
    words += ["float8 weights"] if spec.weight_dtype else []
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
