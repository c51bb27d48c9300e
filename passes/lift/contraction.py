"""Contractions: matrix products in all their forms, read as a sum over new axes."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from torch.fx import Node

from attnfuse.axes import Index, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Dot, Place
from attnfuse.passes.lift.pointwise import operand
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.passes.lift.view import aligned
from attnfuse.score import Expr, apply

__all__ = ["CONTRACTIONS"]


def _product(reader: Reader, node: Node, left: Node, right: Node, place: Place) -> Expr:
    """``left @ right`` as torch.matmul defines it, for operands of one or more dimensions."""
    inner = reader.space.fresh(facts.shape(left)[-1])
    rows = place[:-1] if facts.rank(right) > 1 else place
    batch = rows[:-1] if facts.rank(left) > 1 else rows
    row = rows[-1:] if facts.rank(left) > 1 else ()
    column = place[-1:] if facts.rank(right) > 1 else ()
    left_place = (*_batch_of(left, 1 + len(row), batch), *row, inner)
    right_place = (*_batch_of(right, 1 + len(column), batch), inner, *column)
    return reader.atom(Dot(node, place, left, left_place, right, right_place, inner.axes))


def _batch_of(node: Node, matrix_dims: int, batch: Place) -> Place:
    """The batch dimensions of an operand."""
    return aligned(facts.shape(node)[: facts.rank(node) - matrix_dims], batch)


def _matmul(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return _product(reader, node, args["self"], args.get("other", args.get("mat2")), place)


def _with_addend(left: str, right: str) -> Rule:
    """``beta * self + alpha * (left @ right)``."""

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        product = _product(reader, node, args[left], args[right], place)
        scaled = apply("mul", reader.scalar(args["alpha"]), product)
        if args["beta"] == 0:  # self is then ignored, NaN or not
            return scaled
        addend = apply("mul", reader.scalar(args["beta"]), operand(reader, args["self"], place))
        return apply("add", scaled, addend)

    return rule


def _linear(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source, weight, bias = args["input"], args["weight"], args.get("bias")
    inner = reader.space.fresh(facts.shape(source)[-1])
    weight_place = (*place[-1:], inner) if facts.rank(weight) == 2 else (inner,)
    source_place = (*(place[:-1] if facts.rank(weight) == 2 else place), inner)
    product = reader.atom(Dot(node, place, source, source_place, weight, weight_place, inner.axes))
    return product if bias is None else apply("add", product, operand(reader, bias, place))


def _einsum(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    tensors = args["tensors"]
    if len(tensors) != 2:
        raise Unreadable("an einsum that is not a product of two tensors")
    terms, _, result = _explicit(args["equation"].replace(" ", ""), tensors).partition("->")
    letters = terms.split(",")
    at = dict(zip(result, place, strict=True))
    for tensor, names in zip(tensors, letters, strict=True):
        for name, size in zip(names, facts.shape(tensor), strict=True):
            if name not in at:
                at[name] = reader.space.fresh(size)
    if any(len(set(names)) != len(names) for names in letters):
        raise Unreadable("an einsum that reads a diagonal")
    summed = tuple(axis for name, index in at.items() if name not in result for axis in index.axes)
    left, right = (
        tuple(Index() if size == 1 else at[name] for name, size in zip(names, facts.shape(tensor), strict=True))
        for tensor, names in zip(tensors, letters, strict=True)
    )
    return reader.atom(Dot(node, place, tensors[0], left, tensors[1], right, summed))


def _explicit(equation: str, tensors: Sequence[Node]) -> str:
    """The equation with its result spelled, and ``...`` with letters of its own, aligned right as it broadcasts."""
    if "->" not in equation:
        once = sorted(x for x in equation if x.isalpha() and equation.count(x) == 1)
        equation += "->" + ("..." if "..." in equation else "") + "".join(once)
    terms = equation.partition("->")[0].split(",")
    spans = [facts.rank(t) - len(term) + 3 for t, term in zip(tensors, terms, strict=True) if "..." in term]
    fresh = [letter for letter in ascii_letters if letter not in equation][: max(spans, default=0)]
    for term, tensor in zip(terms, tensors, strict=True):
        span = facts.rank(tensor) - len(term) + 3
        equation = equation.replace(term, term.replace("...", "".join(fresh[len(fresh) - span :])), 1)
    return equation.replace("...", "".join(fresh))


def _tensordot(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    left, right = args["self"], args["other"]
    left_dims = [d % facts.rank(left) for d in args["dims_self"]]
    right_dims = [d % facts.rank(right) for d in args["dims_other"]]
    summed = [reader.space.fresh(facts.shape(left)[d]) for d in left_dims]
    rest = iter(place)
    left_place, right_place = (
        tuple(summed[dims.index(d)] if d in dims else next(rest) for d in range(facts.rank(tensor)))
        for tensor, dims in ((left, left_dims), (right, right_dims))
    )
    axes = tuple(axis for index in summed for axis in index.axes)
    return reader.atom(Dot(node, place, left, left_place, right, right_place, axes))


#: Sums of products, by ATen name.
CONTRACTIONS: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "baddbmm": _with_addend("batch1", "batch2"),
    "addmm": _with_addend("mat1", "mat2"),
    "linear": _linear,
    "einsum": _einsum,
    "tensordot": _tensordot,
}
