"""Tensors made of index arithmetic: aranges, constants, triangles, and gathers by such indices."""

from __future__ import annotations

from torch.fx import Node

from attnfuse.axes import Index, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Place
from attnfuse.passes.lift.pointwise import operand
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.score import Const, Expr, apply

__all__ = ["CREATE"]


def _arange(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    start, step = (reader.scalar(args.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    value = apply("add", start, apply("mul", step, reader.position(place[0])))
    return apply("float", value) if facts.dtype(node).is_floating_point else value


def _filled(value: float | int | bool) -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        return _as_dtype(node, Const(value))

    return rule


def _full(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return _as_dtype(node, reader.scalar(args["fill_value"]))


def _scalar_tensor(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return _as_dtype(node, reader.scalar(args["s"]))


def _as_dtype(node: Node, value: Expr) -> Expr:
    """The literal in the tensor's dtype, so that its Python type says what it is."""
    if not isinstance(value, Const):
        return value
    kind = facts.kind(node)
    return Const({"bool": bool, "int": int, "float": float}[kind](value.value))


def _triangle(op: str) -> Rule:
    """``tril`` keeps column <= row + diagonal, ``triu`` column >= row + diagonal; the rest is zero."""

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        row, column = map(reader.position, place[-2:])
        keep = apply(op, column, apply("add", row, reader.scalar(args.get("diagonal", 0))))
        return apply("where", keep, reader.read(args["self"], place), _as_dtype(node, Const(0)))

    return rule


def _index(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``x[i, j]`` with index tensors that are index arithmetic themselves, such as ``mask[batch, key]``."""
    source: Node = args["self"]
    given: list[Node | None] = [*args["indices"], *[None] * (facts.rank(source) - len(args["indices"]))]
    used = [at for at, index in enumerate(given) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise Unreadable("index tensors in dimensions that are not next to each other")
    tensors = [index for index in given if index is not None]
    width = max(map(facts.rank, tensors))
    shared = place[used[0] : used[0] + width]
    rest = iter(place[: used[0]] + place[used[0] + width :])
    found = (next(rest) if index is None else _looked_up(reader, index, shared) for index in given)
    return reader.read(source, tuple(found))


def _looked_up(reader: Reader, index: Node, place: Place) -> Index:
    if facts.kind(index) != "int":
        raise Unreadable("indexing by a mask")
    return reader.as_index(operand(reader, index, place))


#: Operations that make a tensor from sizes and indices, by ATen name.
CREATE: dict[str, Rule] = {
    "arange": _arange,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full"), _full),
    "scalar_tensor": _scalar_tensor,
    "tril": _triangle("le"),
    "triu": _triangle("ge"),
    "index": _index,
}
