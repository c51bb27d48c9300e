"""Activation functions, spelled with simpler operations."""

from __future__ import annotations

import math

from torch.fx import Node

from attnfuse.axes import Unreadable
from attnfuse.passes.lift.atoms import Place
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.score import Const, Expr, apply

__all__ = ["ACTIVATIONS"]


def _silu(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    x = reader.read(args["self"], place)
    return apply("mul", x, apply("sigmoid", x))


def _gelu(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    x = reader.read(args["self"], place)
    if args["approximate"] == "tanh":
        cubic = apply("mul", Const(0.044715), apply("mul", x, apply("mul", x, x)))
        bent = apply("tanh", apply("mul", Const(math.sqrt(2 / math.pi)), apply("add", x, cubic)))
    else:
        bent = apply("erf", apply("mul", Const(math.sqrt(0.5)), x))
    return apply("mul", apply("mul", Const(0.5), x), apply("add", bent, Const(1.0)))


def _leaky_relu(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    x = reader.read(args["self"], place)
    return apply("where", apply("gt", x, Const(0.0)), x, apply("mul", reader.scalar(args["negative_slope"]), x))


def _softplus(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    # above the threshold torch returns x itself, which is what softplus rounds to there
    if args["beta"] != 1 or args["threshold"] < 20:
        raise Unreadable("a softplus with a beta or a low threshold")
    return apply("softplus", reader.read(args["self"], place))


#: By ATen name.
ACTIVATIONS: dict[str, Rule] = {"silu": _silu, "gelu": _gelu, "leaky_relu": _leaky_relu, "softplus": _softplus}
