"""What is known about a node. The only place that looks into ``node.meta`` and ``node.args``, which are untyped.

Dynamo graphs keep fake values in ``meta["example_value"]``, export and ATen graphs in ``meta["val"]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.fx import Node

from attnfuse.axes import Size

__all__ = [
    "arguments",
    "dtype",
    "hint",
    "hint_of",
    "hint_of_size",
    "is_aten",
    "is_mutating",
    "is_parameter",
    "is_tensor",
    "is_view",
    "kind",
    "literal",
    "op_name",
    "rank",
    "shape",
    "size_of",
    "source_line",
    "tensor",
    "value",
    "written",
]


def value(node: Node) -> Any:
    """The fake value a node was traced with: a tensor, a tuple of them, a number, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def tensor(node: Node) -> torch.Tensor:
    """The fake tensor of a node. Raises TypeError when its value is something else."""
    found = value(node)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor")
    return found


def is_tensor(node: object) -> bool:
    """Whether something is a node whose value is one tensor."""
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def is_parameter(node: Node) -> bool:
    """Whether a node is a module's parameter, as far as its fake value knows."""
    return node.op in ("placeholder", "get_attr") and isinstance(value(node), torch.nn.Parameter)


def dtype(node: Node) -> torch.dtype:
    """A tensor node's dtype."""
    return tensor(node).dtype


def kind(node: Node) -> str:
    """What a tensor holds, as score programs know it: bool, int or float."""
    found = dtype(node)
    if found == torch.bool:
        return "bool"
    return "float" if found.is_floating_point else "int"


def rank(node: Node) -> int:
    """A tensor node's number of dimensions."""
    return tensor(node).dim()


def shape(node: Node) -> tuple[Size, ...]:
    """A tensor's sizes, symbolic ones as sympy expressions in the shape environment's own symbols."""
    return tuple(map(size_of, tensor(node).shape))


def size_of(number: object) -> Size:
    """An int, or the expression of a SymInt, or that of a node which computes one."""
    if isinstance(number, Node):
        return size_of(value(number))
    if isinstance(number, torch.SymInt):
        expr = number.node.expr
        return int(expr) if expr.is_Integer else expr
    if isinstance(number, int):
        return number
    if isinstance(number, sympy.Expr):
        return int(number) if number.is_Integer else number
    raise TypeError(f"{number!r} is not a size")


def hint(node: Node) -> tuple[int, ...]:
    """A tensor's sizes with each symbol replaced by the value it was traced with."""
    return tuple(hint_of_size(size) for size in tensor(node).shape)


def hint_of(node: Node) -> int:
    """The number that a node which computes a size was traced with."""
    return hint_of_size(value(node))


def hint_of_size(size: int | torch.SymInt) -> int:
    """The number that a size was traced with."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return int(known) if known is not None else 1


def literal(node: Node) -> bool | int | float | None:
    """The number that a program made a tensor of, as in ``torch.tensor(0.0)``; None for every other node.

    Tracing keeps such a tensor in the traced module, under a name of its own.
    """
    if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
        return None
    found = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(found, torch.Tensor) or isinstance(found, FakeTensor) or found.dim():
        return None
    number: bool | int | float = found.item()
    return number


def op_name(node: Node) -> str:
    """``matmul`` for ``aten.matmul.default``; in-place variants keep their underscore; "" for non-ATen calls."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", ""))


def arguments(node: Node) -> Mapping[str, Any]:
    """A call's arguments by their names in the operator's schema, defaults filled in; {} for calls without one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema
    found = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    positional = [arg.name for arg in schema.arguments if not arg.kwarg_only]
    return found | dict(zip(positional, node.args, strict=False)) | node.kwargs


def is_aten(node: Node) -> bool:
    """Whether the node calls an operator with a schema."""
    return isinstance(node.target, torch._ops.OpOverload)


def is_mutating(node: Node) -> bool:
    """Whether the call writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: Node) -> bool:
    """Whether the call's result has the storage of one of its arguments, as its schema says."""
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    return schema is not None and any(each.alias_info is not None for each in schema.returns)


def written(node: Node) -> Iterator[Node]:
    """The tensors that a mutating call writes into."""
    found = arguments(node)
    for arg in node.target._schema.arguments:  # type: ignore[union-attr]  # callers ask is_mutating first
        if arg.alias_info is not None and arg.alias_info.is_write:
            many = found.get(arg.name)
            yield from (x for x in (many if isinstance(many, (list, tuple)) else (many,)) if isinstance(x, Node))


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n\s+(?P<code>[^\n]+))?')


def source_line(node: Node) -> str:
    """The user's line that made the node, ``file:line, code``; empty when the graph does not know it."""
    frames: Sequence[re.Match[str]] = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    last = frames[-1]
    return f"{last['file']}:{last['line']}, {(last['code'] or '').strip()}".rstrip(", ")
