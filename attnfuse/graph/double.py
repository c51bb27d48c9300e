"""A graph carried out in float64, whatever dtypes it was written for: the yardstick for rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.node import map_aggregate

from attnfuse.reference import is_float8

__all__ = ["nudged", "run_in_double", "widened"]

#: Softmax of decomposed graphs: its last argument says that half is converted, which double is not.
_HALF_TO_FLOAT = (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)


def run_in_double(graph: GraphModule, arguments: Sequence[Any]) -> Any:
    """The graph's result on :func:`widened` arguments, every floating-point value and cast in it made float64.

    Integers and constants of the source (finfo.min of the source's dtype) stay what they are. Raises
    what an operator raises that has no float64 form.
    """
    with _float64_by_default():
        return _Double(graph).run(*arguments)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widened(part: Any) -> Any:
    """A tensor or dtype of any floating-point width as float64; everything else as it is."""
    match part:
        case Tensor() if part.is_floating_point():
            return part.double()
        case torch.dtype() if part.is_floating_point:
            return torch.float64
    return part


def nudged(part: Any, random: torch.Generator) -> Any:
    """A floating-point tensor in float64, each element moved by one rounding, up or down; all else as it is.

    ``random`` is a generator of the CPU's, so that every device draws the same directions. A float8 moves by a
    rounding of bfloat16, as which programs read it.
    """
    if not isinstance(part, Tensor) or not part.is_floating_point():
        return part
    up = torch.randint(0, 2, part.shape, generator=random, dtype=torch.float64).to(part.device)
    # half an eps is the most that rounding to nearest moves a number by
    rounded = torch.bfloat16 if is_float8(part.dtype) else part.dtype
    return part.double() * (1 + (up - 0.5) * torch.finfo(rounded).eps)


class _Double(Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        if target in _HALF_TO_FLOAT:
            args = (*args[:2], False)
        return super().call_function(target, map_aggregate(args, widened), map_aggregate(kwargs, widened))

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return _nested(found) if isinstance(found, GraphModule) else widened(found)


def _nested(graph: GraphModule) -> Callable[..., Any]:
    """The body of a branch, loop or no-grad region, in float64 as well."""
    return lambda *arguments: _Double(graph).run(*map(widened, arguments))
