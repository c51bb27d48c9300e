"""Near misses: a spelled attention with one thing changed, so that it is another attention, or none, or no program."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from functools import partial

__all__ = ["changed", "ways"]

_COMPARISONS = {
    ast.LtE: ast.Lt,
    ast.Lt: ast.LtE,
    ast.GtE: ast.Gt,
    ast.Gt: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr}
_METHODS = {
    "tril": "triu",
    "triu": "tril",
    "amax": "amin",
    "max": "min",
    "softmax": "sigmoid",
    "exp": "abs",
    "tanh": "sin",
    "repeat_interleave": "roll",
    "transpose": "flip",
    "logsumexp": "amax",
    "mul": "sub",
}
_NAMES = {
    "q": "k",
    "k": "q",
    "v": "k",
    "scores": "weights",
    "weights": "scores",
    "M": "N",
    "N": "M",
    "H": "K",
    "K": "H",
}


def ways(source: str) -> int:
    """In how many ways one literal, operator, name, method or statement of ``source`` can be changed."""
    return len(_changes(ast.parse(source)))


def changed(source: str, way: int) -> str:
    """``source``, changed in one of those ways."""
    tree = ast.parse(source)
    _changes(tree)[way]()
    return ast.unparse(ast.fix_missing_locations(tree))


def _changes(tree: ast.Module) -> list[Callable[[], None]]:
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    inside = [change for node in ast.walk(function) for change in _changes_of(node)]
    return [*inside, *(partial(function.body.remove, statement) for statement in function.body[:-1])]


def _changes_of(node: ast.AST) -> Iterator[Callable[[], None]]:
    match node:
        case ast.Constant(value=bool(value)):
            yield lambda: setattr(node, "value", not value)
        case ast.Constant(value=int(value)):
            yield from (partial(setattr, node, "value", new) for new in {value + 1, value - 1, -value} - {value})
        case ast.Constant(value=float(value)):
            yield from (partial(setattr, node, "value", new) for new in {value * 2, -value, 0.0} - {value})
        case ast.Constant(value="-inf"):
            yield lambda: setattr(node, "value", "inf")
        case ast.Compare(ops=[op]):
            yield lambda: setattr(node, "ops", [_COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            yield lambda: setattr(node, "op", _OPERATORS[type(op)]())
            yield lambda: node.__dict__.update(left=copy.deepcopy(node.right), right=copy.deepcopy(node.left))
        case ast.UnaryOp(op=ast.Invert() | ast.USub()):
            yield lambda: setattr(node, "op", ast.UAdd() if isinstance(node.op, ast.USub) else ast.USub())
        case ast.Attribute(attr=name) if name in _METHODS:
            yield lambda: setattr(node, "attr", _METHODS[name])
        case ast.Name(id=name, ctx=ast.Load()) if name in _NAMES:
            yield lambda: setattr(node, "id", _NAMES[name])
