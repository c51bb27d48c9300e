"""Assembles a site: which contraction is the scores', which the values', and what happens between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from attnfuse.algebra import WEIGHT_RULES, normalise
from attnfuse.axes import Axis, Unreadable
from attnfuse.errors import Refused
from attnfuse.graph import facts
from attnfuse.kernels import Source
from attnfuse.passes.lift.atoms import Dot, Dropped, Leaf, Place, Reduced, Softmax
from attnfuse.passes.lift.operand import factored, viewed
from attnfuse.passes.lift.product import atoms_of, query_and_key, score_product
from attnfuse.passes.lift.quantised import quantised_to
from attnfuse.passes.lift.reader import Reader, TakeAsTensor
from attnfuse.passes.site import Operand, Site
from attnfuse.reference import is_float8
from attnfuse.score import Apply, Capture, Const, Expr, P, S, apply, rewrite, walk
from attnfuse.spec import EmptyRows, Normaliser

__all__ = [
    "Parts",
    "assembled",
    "read_site",
    "site_of",
    "softmax_over",
    "weight_program",
]


def read_site(reader: Reader, node: Node) -> Site | None:
    """The attention whose result ``node`` is, a contraction.

    None where it is no attention. Raises :class:`Unreadable` and :class:`Refused` where it is and cannot be lifted,
    and :class:`TakeAsTensor` where it can be by a reader that leaves one node unread.
    """
    if any(size == 0 for size in facts.shape(node)):
        raise Unreadable("a dimension is empty")
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    outer = _top_product(reader, node, place)
    sides = ((outer.left, outer.left_place), (outer.right, outer.right_place))
    for (weights, weight_place), (values, value_place) in (sides, sides[::-1]):
        read = reader.read(weights, weight_place)
        softmax = softmax_over(reader, read, outer)
        if softmax is not None:
            sides_read = (weight_place, values, value_place)
            return assembled(reader, node, place, outer, softmax, read, sides_read, Const(1.0))
    return None


def _top_product(reader: Reader, node: Node, place: Place) -> Dot:
    """The contraction that a node is."""
    match reader.read(node, place):
        case Capture(slot):
            pass
        case _:
            reason = reader.unread.get(node, "it is scaled or added to in the same operation")
            raise Unreadable(f"the product with the values cannot be read: {reason}")
    atom = reader.atoms[slot]
    if not isinstance(atom, Dot):
        raise Unreadable("the product with the values cannot be read: it is only a part of one")
    return atom


def _refusal(reason: str, node: Node) -> Refused:
    return Refused(reason, node.name, facts.source_line(node))


def softmax_over(reader: Reader, weights: Expr, outer: Dot) -> Softmax | None:
    """The softmax that weights are of; None where there is none. Raises :class:`Refused` where it is another one."""
    found = {atom for atom in atoms_of(reader, weights) if isinstance(atom, Softmax)}
    if not found:
        return None
    if len(found) > 1:
        raise _refusal("the weights mix several softmaxes", outer.node)
    (softmax,) = found
    if reader.space.resolve(softmax.key.axes) != reader.space.resolve(outer.axes):
        raise _refusal("the softmax runs over another axis than the product with the values sums over", softmax.node)
    return softmax


def assembled(
    reader: Reader,
    node: Node,
    place: Place,
    outer: Dot,
    softmax: Softmax,
    weights: Expr,
    sides: tuple[Place, Node, Place],
    factor: Expr,
) -> Site:
    """The site of a softmax; ``sides`` are the place of the weights, the values and theirs, ``factor`` what multiplies
    their product.
    """
    weight_place, values, value_place = sides
    inner = score_product(reader, softmax.logit, softmax.key.axes, value_place)
    if inner is None:
        raise _refusal("the logits are not read as coming from one product of queries and keys", softmax.node)
    if any(size == 0 for side in (inner.left, inner.right) for size in facts.shape(side)):
        raise Unreadable("a dimension is empty")
    sides_of_scores = query_and_key(reader, inner, softmax.key.axes)
    query, key = (factored(reader, *side, inner.node, inner.axes) for side in sides_of_scores)
    value = viewed(reader, values, value_place, outer.node, weight_place)
    value = replace(value, factor=apply("mul", factor, value.factor))
    dropout, weight = _after_softmax(reader, weights, softmax)
    dot = apply("mul", apply("mul", query.factor, key.factor), S)
    slot = reader.atom(inner)
    score = rewrite(softmax.logit, lambda e: dot if e == slot else e)
    parts = Parts(
        node=node,
        product=inner.node,
        softmax=softmax.node,
        place=place,
        weight_place=weight_place,
        keys=outer.axes,
        inner=inner.axes,
        operands=(query, key, value),
        score=score,
        weight=weight,
        extra=softmax.extra,
        dropout=dropout,
        empty_rows=softmax.empty_rows,
        weight_dtype=quantised_to(outer.left if values is outer.right else outer.right),
        weights=tuple(_weights(reader, softmax)),
    )
    return site_of(reader, parts)


def _weights(reader: Reader, softmax: Softmax) -> Iterator[Leaf]:
    """The nodes that were read as the softmax itself, in graph order."""
    found = reader.read_as(reader.atom(softmax))
    for leaf in sorted(found, key=lambda leaf: reader.order.position[leaf.node]):
        if not is_float8(facts.dtype(leaf.node)):
            yield leaf


def _after_softmax(reader: Reader, weights: Expr, softmax: Softmax) -> tuple[float, Expr]:
    """Dropout's rate, and what happens to a normalised weight before it."""
    dropout, weights = weight_program(reader, weights, softmax.node)
    normalised = reader.atom(softmax)
    weight = rewrite(weights, lambda e: P if e == normalised else e)
    if any(isinstance(atom, Softmax) for atom in atoms_of(reader, weight)):
        raise _refusal("something happens to the weights after dropout", softmax.node)
    return dropout, weight


@dataclass(frozen=True)
class Parts:
    """What a :class:`Site` is made of, as it was read: places before later splits, programs of any atoms."""

    node: Node
    product: Node
    softmax: Node
    place: Place
    weight_place: Place
    keys: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    operands: tuple[Operand, Operand, Operand]
    score: Expr
    weight: Expr = P
    extra: tuple[Expr, ...] = ()
    dropout: float = 0.0
    normaliser: Normaliser = "softmax"
    empty_rows: EmptyRows = "nan"
    source: Source = "written"
    exact_scores: bool = False
    weight_dtype: str | None = None
    weights: tuple[Leaf, ...] = ()

    @property
    def programs(self) -> tuple[Expr, ...]:
        """Score, weight, which value's factor goes with, and the extra logits."""
        by = self.operands[2].factor
        if self.normaliser == "none":
            return (apply("mul", by, self.score), self.weight, *self.extra)
        return (self.score, apply("mul", by, self.weight), *self.extra)


def site_of(reader: Reader, parts: Parts) -> Site:
    """The site in today's axes, its programs of leaves alone. Raises :class:`Refused` where they cannot be."""
    score, weight, *extra = _checked(reader, parts)
    query, key, value = (_final(reader, operand) for operand in parts.operands)
    return Site(
        node=parts.node,
        product=parts.product,
        softmax=parts.softmax,
        place=reader.final(parts.place),
        weight_place=reader.final(parts.weight_place),
        keys=reader.space.resolve(parts.keys),
        inner=reader.space.resolve(parts.inner),
        query=query,
        key=key,
        value=value,
        score=score,
        weight=normalise(weight, reader.kind_of),
        extra=tuple(extra),
        dropout=parts.dropout,
        normaliser=parts.normaliser,
        empty_rows=parts.empty_rows,
        source=parts.source,
        exact_scores=parts.exact_scores,
        weight_dtype=parts.weight_dtype,
        weights=tuple(final for leaf in parts.weights if reader.is_plain(final := _final_leaf(reader, leaf))),
        leaves={slot: _final_leaf(reader, atom) for slot, atom in enumerate(reader.atoms) if isinstance(atom, Leaf)},
        variables={name: reader.space.resolve(index.axes) for name, index in reader.axes.items()},
        symbols=tuple(reader.symbols),
        consumers=dict(reader.consumer),
        reads=_widest_reads(reader),
    )


def _checked(reader: Reader, parts: Parts) -> list[Expr]:
    """The programs of leaves alone, the score's in its normal form. Raises :class:`Refused` where one is no number."""
    score, weight, *extra = (_leaves_only(reader, program) for program in parts.programs)
    unnormalised = parts.normaliser == "none"
    programs = [normalise(score, reader.kind_of, WEIGHT_RULES if unnormalised else ()), weight, *extra]
    if any(_overflows(program, unnormalised=unnormalised) for program in programs):
        reason = "the program makes scores infinite: by a literal, a division by zero, or a mask without a softmax"
        raise _refusal(reason, parts.softmax)
    if any(part == apply("log", P) for part in walk(weight)):
        raise _refusal("the logarithm of a weight is used, which is finite where the weight is zero", parts.softmax)
    return programs


#: Operations whose result is finite, or what it would be without, where one of their arguments is infinite.
_BOUNDS = ("min", "max", "lt", "le", "gt", "ge", "eq", "ne")

#: A weight beyond overflows in sums of some type.
_LARGEST_WEIGHT = 1e30


def _overflows(program: Expr, *, unnormalised: bool) -> bool:
    """Whether a literal makes a logit ``inf`` or NaN: behind a mask of -inf it is NaN, which kernels leave out.

    Without a softmax the lowest number is no mask either: its products overflow, in which order decides to what.
    """
    match program:
        case Const(float(value)):
            return math.isnan(value) or value == math.inf or (unnormalised and abs(value) > _LARGEST_WEIGHT)
        case Apply("div", (_, Const(value))) if value == 0:
            return True
        case Apply(op, args) if op not in _BOUNDS:
            return any(_overflows(arg, unnormalised=unnormalised) for arg in args)
    return False


def _widest_reads(reader: Reader) -> dict[Node, Place]:
    """Where each node was read: of several places, one that runs over the most axes."""
    found: dict[Node, Place] = {}
    for node, read in reader.trail:
        place = reader.final(read)
        if node not in found or sum(len(i.axes) for i in place) > sum(len(i.axes) for i in found[node]):
            found[node] = place
    return found


def _final(reader: Reader, operand: Operand) -> Operand:
    return Operand(operand.factor, tuple(_final_leaf(reader, leaf) for leaf in operand.views))


def _final_leaf(reader: Reader, leaf: Leaf) -> Leaf:
    return Leaf(leaf.node, reader.final(leaf.place))


def weight_program(reader: Reader, weights: Expr, node: Node) -> tuple[float, Expr]:
    """Dropout's rate and a weight before it. Raises :class:`Refused` at ``node`` where dropout is not the last step."""
    rate = 0.0
    match weights:
        case Capture(slot):
            atom = reader.atoms[slot]
            if isinstance(atom, Dropped):
                rate, weights = atom.rate, atom.inner
    if any(isinstance(atom, Dropped) for atom in atoms_of(reader, weights)):
        raise _refusal("something happens to the weights after dropout", node)
    return rate, weights


def _leaves_only(reader: Reader, expr: Expr) -> Expr:
    """Every atom that is no leaf, a second product or a reduction, taken as the tensor that it is."""

    def as_leaf(part: Expr) -> Expr:
        if not isinstance(part, Capture):
            return part
        atom = reader.atoms[part.slot]
        match atom:
            case Leaf():
                return part
            case Dot(place=place) | Reduced(result=place):
                if not reader.is_plain(Leaf(atom.node, place)):
                    raise TakeAsTensor(atom.node)
                return reader.leaf(atom.node, place)
        raise _refusal("the logits hold another softmax or dropout", atom.node)

    return rewrite(expr, as_leaf)
