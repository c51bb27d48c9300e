"""Constant tensors as index arithmetic: masks and positions that a model keeps as buffers, checked value by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from attnfuse.passes.lift.atoms import Place
from attnfuse.score import Const, Expr, Index, apply

__all__ = ["Constants", "formula_of"]

#: A larger tensor is left unread: checking all its values would take seconds.
_MOST_ELEMENTS = 1 << 27

ROW, COLUMN = Index("row"), Index("column")


@dataclass(frozen=True)
class Formula:
    """``expr`` of the positions along ``dims``, which it calls ``row`` and ``column``, or ``column`` alone."""

    dims: tuple[int, ...]
    expr: Expr


@dataclass(frozen=True)
class Constants:
    """The formulas of a graph's constants; ``value`` is a node's value, None where that may change."""

    value: Callable[[Node], Tensor | None] = lambda node: None
    known: dict[tuple[object, ...], Formula | None] = field(default_factory=dict)

    def formula(self, node: Node, place: Place) -> Formula | None:
        """What holds all over the tensor, or at least where it is read; in positions of the whole tensor."""
        tensor = self.value(node)
        if tensor is None or tensor.numel() > _MOST_ELEMENTS:
            return None
        whole = self._remembered((node,), tensor, (0,) * tensor.dim())
        return whole if whole is not None else self._part(node, tensor, place)

    def _part(self, node: Node, tensor: Tensor, place: Place) -> Formula | None:
        spans = [(index.offset, index.extent) for index in place]
        if not all(isinstance(number, int) for span in spans for number in span):
            return None
        for dim, (start, length) in enumerate(spans):
            tensor = tensor.narrow(dim, start, length)
        return self._remembered((node, *spans), tensor, tuple(start for start, _ in spans))

    def _remembered(self, key: tuple[object, ...], tensor: Tensor, starts: tuple[int, ...]) -> Formula | None:
        if key not in self.known:
            self.known[key] = formula_of(tensor, starts)
        return self.known[key]


def formula_of(tensor: Tensor, starts: tuple[int, ...]) -> Formula | None:
    """The index arithmetic that gives every value of a tensor that begins at ``starts``; None where none is found."""
    dims = tuple(dim for dim, size in enumerate(tensor.shape) if size != 1)
    if len(dims) > 2 or not tensor.numel() or bool(tensor.isnan().any()):
        return None
    first = [starts[dim] for dim in dims]
    values = tensor.detach().cpu().reshape([tensor.shape[dim] for dim in dims] or [1])
    if len(dims) < 2:
        values, first = values.reshape(1, -1), [0, *(first or [0])]
    found = _line(values, *first) if values.shape[0] == 1 else None
    found = _choice(values, *first) if found is None else found
    return None if found is None else Formula(dims, found)


def _literal(value: Tensor) -> Const:
    return Const(value.item())


def _line(values: Tensor, _: int, start: int) -> Expr | None:
    """``a * column + b``: positions; equal numbers are no positions."""
    if values.dtype not in (torch.int64, torch.int32) or values.shape[1] < 2:
        return None
    step = int(values[0, 1] - values[0, 0])
    offset = int(values[0, 0]) - step * start
    column = torch.arange(start, start + values.shape[1])
    if step == 0 or not bool((values[0] == step * column + offset).all()):
        return None
    return apply("add", apply("mul", Const(step), COLUMN), Const(offset))


def _choice(values: Tensor, row: int, column: int) -> Expr | None:
    """``where(predicate, a, b)`` of a tensor with two values, or its one value."""
    a = values[0, 0]
    chosen = values == a
    if bool(chosen.all()):
        return _literal(a)
    b = values[~chosen][0]
    if not bool((values[~chosen] == b).all()):
        return None
    for keep, yes, no in ((chosen, a, b), (~chosen, b, a)):
        predicate = _predicate(keep, row, column)
        if predicate is not None:
            return predicate if values.dtype == torch.bool and bool(yes) else _chosen(predicate, yes, no)
    return None


def _chosen(predicate: Expr, yes: Tensor, no: Tensor) -> Expr:
    if yes.dtype == torch.bool:
        return apply("not", predicate)
    return apply("where", predicate, _literal(yes), _literal(no))


def _predicate(keep: Tensor, row: int, column: int) -> Expr | None:
    """What ``keep``, which begins at ``(row, column)``, is: a band, a prefix, both, or blocks on a diagonal."""
    m = torch.arange(row, row + keep.shape[0])[:, None]
    n = torch.arange(column, column + keep.shape[1])[None, :]
    return next((expr for expr, mask in _guesses(keep, m, n) if bool((mask == keep).all())), None)


Guess = tuple[Expr, Tensor]


def _guesses(keep: Tensor, m: Tensor, n: Tensor) -> Iterator[Guess]:
    band = _band(keep, m, n)
    yield band
    if keep.shape[0] == 1:
        return
    prefix = int(keep.all(dim=0).long().cumprod(0).sum()) + int(n[0, 0])
    in_prefix = (apply("lt", COLUMN, Const(prefix)), n < prefix)
    yield in_prefix
    highest = int(torch.where(keep & (n >= prefix), n - m, int(n[0, 0]) - int(m[-1, 0])).max())
    yield apply("or", _edge("le", highest), in_prefix[0]), (n - m <= highest) | in_prefix[1]
    block = int(keep[:, 0].long().cumprod(0).sum())
    if block:
        same: Guess = (apply("eq", _block(ROW, block), _block(COLUMN, block)), m // block == n // block)
        yield same
        yield apply("and", same[0], _edge("le", 0)), same[1] & (n <= m)


def _block(index: Expr, size: int) -> Expr:
    return apply("floordiv", index, Const(size))


def _edge(op: str, offset: int) -> Expr:
    return apply(op, COLUMN, apply("add", ROW, Const(offset)))


def _band(keep: Tensor, m: Tensor, n: Tensor) -> Guess:
    """The narrowest band around all that is kept; an edge that cuts nothing off is left out."""
    distance = n - m
    kept = distance.expand(keep.shape)[keep]
    if not kept.numel():
        return Const(False), torch.zeros_like(keep)
    low, high = int(kept.min()), int(kept.max())
    if keep.shape[0] == 1:
        low, high, distance = low + int(m), high + int(m), n
    inside = (distance >= low) & (distance <= high)
    parts: list[Expr] = [
        apply(op, COLUMN, Const(at)) if keep.shape[0] == 1 else _edge(op, at)
        for op, at, end in (("ge", low, int(distance.min())), ("le", high, int(distance.max())))
        if at != end
    ]
    if not parts:
        return Const(True), inside
    return (parts[0] if len(parts) == 1 else apply("and", *parts)), inside
