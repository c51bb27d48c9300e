"""Normalisers: softmax over any axis, with any extra columns, and the maximum that people subtract first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from attnfuse.algebra import normalise
from attnfuse.axes import Index, Size, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Place, RowMax, Softmax
from attnfuse.passes.lift.pointwise import cast
from attnfuse.passes.lift.reader import Reader, Rule
from attnfuse.passes.lift.view import VIEWS
from attnfuse.score import Apply, Capture, Const, Expr, apply, rewrite, walk

__all__ = ["NORMALISERS", "SOFTMAX_NAMES"]

Arguments = Mapping[str, Any]

#: What ends a chain of pointwise operations as a normaliser.
SOFTMAX_NAMES = ("softmax", "_softmax", "special_softmax")

#: More columns than this beside the keys are not sinks.
_MAX_EXTRA = 4


def _softmax(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source: Node = args["self"]
    dim = args["dim"] % len(place)
    key = reader.space.resolved(place[dim])
    logit = _shifted_by_max(reader, source, dim, place, node)
    extra = tuple(
        _shifted_by_max(reader, source, dim, (*place[:dim], Index((), at), *place[dim + 1 :]), node)
        for at in _beyond(key, facts.shape(source)[dim])
    )
    return reader.atom(Softmax(node, key, logit, extra))


def _beyond(key: Index, size: Size) -> range:
    """The columns of a normalised dimension of ``size`` that ``key`` does not run over."""
    if key.axes and key.covers(size):
        return range(0)
    if not key.axes or not isinstance(size, int) or not isinstance(key.extent, int):
        raise Unreadable("a part of a softmax of unknown size")
    if key.offset != 0 or size - key.extent > _MAX_EXTRA:
        raise Unreadable("a softmax of which an inner part is used")
    return range(key.extent, size)


def _shifted_by_max(reader: Reader, source: Node, dim: int, place: Place, node: Node) -> Expr:
    """The logit, without a subtracted row maximum: softmax does not change under a shift of its row.

    Only a multiple of the logits' own maximum is dropped, as in ``x - max(x)`` or ``c * (x / c - max(x / c))``.
    It is finite wherever any result is, and where it is not, the shifted row and the unshifted one are NaN alike.
    """
    logit = cast(reader, reader.read(source, place), facts.dtype(source), facts.dtype(node))
    row = (*place[:dim], Index(), *place[dim + 1 :])
    for part in walk(logit):
        match part:
            case Apply("mul", (Const(factor), Capture(slot))) if factor < 0:
                atom = reader.atoms[slot]
                if isinstance(atom, RowMax) and (atom.dim, reader.final(atom.place)) == (dim, reader.final(row)):
                    own = apply("mul", Const(-factor), reader.read(atom.operand, place))
                    plain = rewrite(logit, lambda e, part=part: Const(0.0) if e == part else e)
                    if normalise(own, reader.kind_of) == normalise(plain, reader.kind_of):
                        return own
    return logit


def _row_max(reader: Reader, node: Node, operand: Node, dim: int, keepdim: bool, place: Place) -> Expr:
    at = dim % facts.rank(operand)
    full = (*place[:at], Index(), *place[at + (1 if keepdim else 0) :])
    return reader.atom(RowMax(node, operand, at, full))


def _amax(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    dims = args["dim"]
    if len(dims) != 1:
        raise Unreadable("a maximum over several dimensions")
    return _row_max(reader, node, args["self"], dims[0], args["keepdim"], place)


def _getitem(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``x.max(dim).values``, or a piece of a split."""
    many, number = node.args
    if isinstance(many, Node) and facts.op_name(many) == "max" and number == 0:
        inner = facts.arguments(many)
        return _row_max(reader, node, inner["self"], inner["dim"], inner["keepdim"], place)
    return VIEWS["getitem"](reader, node, args, place)


#: Softmax and the maximum, by ATen name.
NORMALISERS: dict[str, Rule] = {
    **dict.fromkeys(SOFTMAX_NAMES, _softmax),
    "amax": _amax,
    "getitem": _getitem,
}
