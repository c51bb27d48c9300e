"""What an operation does to the layout of what it reads: ``sources`` are the values that decide how its result lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.weightless import source_of

__all__ = ["OPERANDS", "Copies", "Gathers", "Passes", "Reading", "Stops", "Views", "Writes", "reading"]


@dataclass(frozen=True)
class Writes:
    """A contraction: writes the first of ``dims`` contiguously as it stands, and the second when it is turned.

    Neither costs anything, but a bias is added on the fly along columns alone: where there is a ``bias``, writing the
    other layout is one more pass over the result. ``reread`` is an operand that must be copied for it, or None.
    """

    dims: tuple[int, int]
    bias: bool
    reread: Node | None = None
    sources: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Views:
    """A view of ``sources``, which is one, or a copy where it cannot be one.

    ``piece`` says that there are others, made by the same call.
    """

    sources: tuple[Node, ...]
    piece: bool


@dataclass(frozen=True)
class Passes:
    """A pointwise operation: the result lies as ``sources`` do."""

    sources: tuple[Node, ...]


@dataclass(frozen=True)
class Copies:
    """``contiguous`` and ``clone``, of ``sources``, which is one."""

    sources: tuple[Node, ...]


@dataclass(frozen=True)
class Gathers:
    """An operation that writes its result in order of its dimensions, and can be asked to with others in that order."""

    sources: tuple[Node, ...]


@dataclass(frozen=True)
class Stops:
    """Anything else: its result lies as it does."""

    sources: tuple[Node, ...] = ()


Reading = Writes | Views | Passes | Copies | Gathers | Stops

Arguments = Mapping[str, Any]

#: Of each product of matrices, the names of its left and right operands and of what is added to it.
OPERANDS = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("self", "other", ""),
    "mm": ("self", "mat2", ""),
    "bmm": ("self", "mat2", ""),
    "addmm": ("mat1", "mat2", "self"),
    "baddbmm": ("batch1", "batch2", "self"),
}

#: Elementwise operations that torch does not tag as such.
_POINTWISE = frozenset(
    (
        *("to", "_to_copy", "type_as", "dropout", "native_dropout", "dequantize_per_tensor", "quantize_per_tensor"),
        *("quantize_per_channel", "dequantize_per_channel"),
    )
)


def reading(node: Node) -> Reading:
    """How a node of an ATen graph reads its operands."""
    call = source_of(node)
    if not facts.is_aten(call) or facts.is_mutating(call) or not facts.is_tensor(node):
        return Stops()
    name = facts.op_name(call)
    if name in _RULES:
        return _RULES[name](call, facts.arguments(call))
    if name in _POINTWISE or torch.Tag.pointwise in call.target.tags:  # type: ignore[union-attr]  # an operator
        return _pointwise(node)
    if any(result.alias_info is not None for result in call.target._schema.returns):  # type: ignore[union-attr]
        return Views((call.all_input_nodes[0],), piece=call is not node)
    return Stops()


def _pointwise(node: Node) -> Reading:
    """Operands that are broadcast do not decide how the result lies."""
    whole = [arg for arg in node.all_input_nodes if facts.is_tensor(arg) and facts.hint(arg) == facts.hint(node)]
    return Passes(tuple(whole)) if whole else Stops()


def _product(node: Node, args: Arguments) -> Reading:
    left, right, bias = (args.get(name) for name in OPERANDS[facts.op_name(node)])
    tensors = [part for part in (left, right, bias) if isinstance(part, Node)]
    # under autocast the graph's dtypes are not those of the product
    same = all(facts.dtype(part) == facts.dtype(node) for part in tensors)
    matrices = all(facts.rank(part) >= 2 for part in tensors[:2])
    return Writes((-1, -2), bias=bias is not None) if same and matrices else Stops()


def _convolution(node: Node, args: Arguments) -> Reading:
    """One of single points, of one group, is a linear layer over the channels."""
    weight: Node = args["weight"]
    source: Node = args["input"]
    steps = (args.get("stride", 1), args.get("dilation", 1), args.get("padding", 0))
    stride, dilation, padding = ({step} if isinstance(step, (int, str)) else set(step) for step in steps)
    points = all(size == 1 for size in facts.shape(weight)[2:])
    plain = stride == dilation == {1} and padding == {0} and args.get("groups", 1) == 1 and not args.get("transposed")
    if not (points and plain and facts.rank(node) > 2 and facts.dtype(source) == facts.dtype(node)):
        return Stops()
    return Writes((-1, 1), bias=args.get("bias") is not None, reread=source)


def _gather(node: Node, args: Arguments) -> Reading:
    """Operations whose tensors all have the result's rank, and which work along one dimension."""
    many = args.get("tensors", (args.get("self"), args.get("source"), args.get("src")))
    tensors = tuple(arg for arg in many if isinstance(arg, Node))
    same = all(facts.rank(arg) == facts.rank(node) and facts.dtype(arg) == facts.dtype(node) for arg in tensors)
    return Gathers(tensors) if same and isinstance(args.get("dim", 0), int) else Stops()


def _copy(node: Node, args: Arguments) -> Reading:
    source: Node = args["self"]
    # a schema's default is the number of the format
    return Copies((source,)) if args["memory_format"] in (torch.contiguous_format, 0) else Passes((source,))


def _stack(node: Node, args: Arguments) -> Reading:
    return Gathers(tuple(args["tensors"]))


#: Operations that are not views or pointwise, by ATen name.
_RULES: dict[str, Callable[[Node, Arguments], Reading]] = {
    **dict.fromkeys(OPERANDS, _product),
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution),
    **dict.fromkeys(("contiguous", "clone"), _copy),
    **dict.fromkeys(("cat", "concat", "index_select", "index_copy", "slice_scatter", "repeat_interleave"), _gather),
    "stack": _stack,
}
