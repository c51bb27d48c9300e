"""Views and copies: operations that only say where an element comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from attnfuse.axes import Index, Size, Unreadable, same_size
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Place
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.score import Const, Expr

__all__ = ["VIEWS", "aligned", "broadcast"]


def broadcast(node: Node, place: Place) -> Place:
    """A place of a broadcast result as the place of one operand."""
    return aligned(facts.shape(node), place)


def aligned(sizes: Sequence[Size], place: Place) -> Place:
    """The last indices of ``place``, one for each of ``sizes``; a dimension of size 1 is read at 0."""
    tail = place[len(place) - len(sizes) :]
    return tuple(Index() if same_size(size, 1) else index for index, size in zip(tail, sizes, strict=True))


def _same(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return reader.read(args["self"], place)


def _fresh(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``torch.tensor(number)`` is a copy of a tensor that the trace keeps."""
    number = facts.literal(args["self"])
    return reader.read(args["self"], place) if number is None else Const(number)


def _reshape(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source: Node = args["self"]
    return reader.read(source, reader.space.regroup(place, facts.shape(node), facts.shape(source)))


def _expand(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return reader.read(args["self"], broadcast(args["self"], place))


def _permuted(reader: Reader, source: Node, order: Sequence[int], place: Place) -> Expr:
    """``order[i]`` is the source dimension that dimension ``i`` of the result is."""
    at = dict(zip((d % len(order) for d in order), place, strict=True))
    return reader.read(source, tuple(at[d] for d in range(len(order))))


def _permute(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return _permuted(reader, args["self"], args["dims"], place)


def _transpose(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    order = list(range(facts.rank(args["self"])))
    a, b = args.get("dim0", args.get("axis0")), args.get("dim1", args.get("axis1"))
    if not isinstance(a, int) or not isinstance(b, int):
        raise Unreadable("a transpose of named dimensions")
    order[a], order[b] = order[b], order[a]
    return _permuted(reader, args["self"], order, place)


def _matrix_transpose(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    order = list(range(facts.rank(args["self"])))
    return _permuted(reader, args["self"], [*order[:-2], *reversed(order[-2:])], place)


def _full_transpose(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return _permuted(reader, args["self"], list(reversed(range(facts.rank(args["self"])))), place)


def _movedim(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    rank = facts.rank(args["self"])
    as_list = [[v] if isinstance(v, int) else list(v) for v in (args["source"], args["destination"])]
    source, destination = ([d % rank for d in dims] for dims in as_list)
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[destination.index(i)] if i in destination else next(rest) for i in range(rank)]
    return _permuted(reader, args["self"], order, place)


def _unsqueeze(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    at = args["dim"] % len(place)
    return reader.read(args["self"], place[:at] + place[at + 1 :])


def _squeeze(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    sizes = facts.shape(args["self"])
    dims = args.get("dim", tuple(range(len(sizes))))
    chosen = {d % len(sizes) for d in ((dims,) if isinstance(dims, int) else dims)}
    rest = iter(place)
    return reader.read(
        args["self"],
        tuple(Index() if d in chosen and same_size(size, 1) else next(rest) for d, size in enumerate(sizes)),
    )


def _repeat(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``repeat`` lays copies one after another: the copy is the leading digit of the dimension."""
    source: Node = args["self"]
    sizes = facts.shape(source)
    counts = tuple(map(facts.size_of, args.get("repeats", args.get("dims"))))
    place = place[len(counts) - len(sizes) :]
    counts = counts[len(counts) - len(sizes) :]
    return reader.read(source, tuple(map(_last_digits(reader), place, counts, sizes)))


def _last_digits(reader: Reader) -> Any:
    def digits(index: Index, count: Size, size: Size) -> Index:
        if same_size(count, 1):
            return index
        return reader.space.regroup((index,), (count * size,), (count, size))[1]

    return digits


def _repeat_interleave(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``repeat_interleave`` repeats each element: the copy is the trailing digit of the dimension."""
    source: Node = args["self"]
    if not isinstance(args.get("repeats"), int) or args.get("dim") is None:
        raise Unreadable("repeat_interleave with a tensor of counts, or of the flattened tensor")
    dim, count = args["dim"] % len(place), args["repeats"]
    size = facts.shape(source)[dim]
    index = reader.space.regroup((place[dim],), (size * count,), (size, count))[0]
    return reader.read(source, (*place[:dim], index, *place[dim + 1 :]))


def _shifted(reader: Reader, source: Node, dim: int, start: Size, place: Place) -> Expr:
    """The source read ``start`` further along ``dim``."""
    index = place[dim]
    moved = Index(index.axes, index.offset + start)
    return reader.read(source, (*place[:dim], moved, *place[dim + 1 :]))


def _slice(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    dim = (args.get("dim") or 0) % len(place)
    if args.get("step", 1) != 1:
        raise Unreadable("a slice with a step")
    start = facts.size_of(args.get("start") or 0)
    return _shifted(reader, args["self"], dim, _from_front(start, args["self"], dim), place)


def _from_front(start: Size, source: Node, dim: int) -> Size:
    negative = start < 0 if isinstance(start, int) else start.is_negative
    if negative is None:
        raise Unreadable("a slice whose start has no known sign")
    return start + facts.shape(source)[dim] if negative else start


def _narrow(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    start = facts.size_of(args["start"])
    dim = args["dim"] % len(place)
    return _shifted(reader, args["self"], dim, _from_front(start, args["self"], dim), place)


def _select(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source: Node = args["self"]
    dim = args["dim"] % facts.rank(source)
    at = _from_front(facts.size_of(args["index"]), source, dim)
    return reader.read(source, (*place[:dim], Index((), at), *place[dim:]))


#: Operations that give several pieces of one tensor, along their argument ``dim``.
_PIECES = ("split", "chunk", "split_with_sizes", "tensor_split", "unbind")


def _getitem(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """One of the tensors of ``split``, ``chunk`` or ``unbind``."""
    many, number = node.args
    if not isinstance(many, Node) or not isinstance(number, int) or facts.op_name(many) not in _PIECES:
        raise Unreadable("an element of something that is no split")
    inner = facts.arguments(many)
    source: Node = inner["self"]
    dim = inner.get("dim", 0) % facts.rank(source)
    if facts.op_name(many) == "unbind":
        return reader.read(source, (*place[:dim], Index((), number), *place[dim:]))
    before = [facts.size_of(part.shape[dim]) for part in facts.value(many)[:number]]
    return _shifted(reader, source, dim, sum(before), place)


def _cat(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """The one piece that the index stays inside of."""
    dim = args["dim"] % len(place)
    index, start = place[dim], 0
    # torch lets an empty one-dimensional tensor stand among pieces of any rank
    pieces = [piece for piece in args["tensors"] if facts.rank(piece) == len(place)]
    for piece in pieces:
        size = facts.shape(piece)[dim]
        if not isinstance(size, int) and piece is not pieces[0]:
            break
        if _inside(index, start, size):
            return _shifted(reader, piece, dim, -start, place)
        start = start + size
    raise Unreadable("the index runs over several pieces of a concatenation")


def _inside(index: Index, start: Size, size: Size) -> bool:
    """Whether ``start <= index < start + size`` is certain."""
    first, last = index.offset - start, index.offset - start + index.extent - size
    known_first = first >= 0 if isinstance(first, int) else first.is_nonnegative
    known_last = last <= 0 if isinstance(last, int) else last.is_nonpositive
    return bool(known_first and known_last)


#: Operations that only move elements, by ATen name.
VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("contiguous", "clone", "alias", "detach", "view_of"), _same),
    **dict.fromkeys(("lift_fresh_copy", "lift_fresh"), _fresh),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("t", "mT", "matrix_H"), _matrix_transpose),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "numpy_T": _full_transpose,
    "T": _full_transpose,
    "permute": _permute,
    "movedim": _movedim,
    "moveaxis": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _getitem,
    "cat": _cat,
    "concat": _cat,
}
