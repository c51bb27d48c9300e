"""A graph carried out in float64, whatever dtypes it was written for: the yardstick for rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from attnfuse.graph import facts
from attnfuse.reference import is_float8

__all__ = ["nudged", "otherwise_rounded", "run_in_double", "widened"]

T = TypeVar("T")

#: Roundings that are tried before anything is called wrong: which way a choice tips is chance.
_TRIES = 8

#: Softmax of decomposed graphs: its last argument says that half is converted, which double is not.
_HALF_TO_FLOAT = (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)


def run_in_double(graph: GraphModule, arguments: Sequence[Any], random: torch.Generator | None = None) -> Any:
    """The graph's result on :func:`widened` arguments, every floating-point value and cast in it made float64.

    Integers and constants of the source (finfo.min of the source's dtype) stay what they are. With ``random``, a
    generator of the CPU's, every result is then rounded to the dtype it was written for, up or down by chance: a run
    of the source whose roundings fell otherwise (D. Parker, Monte Carlo Arithmetic, 1997). Raises what an operator
    raises that has no float64 form.
    """
    with _float64_by_default():
        return _Double(graph, random).run(*arguments)


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
    return part.double() * (1 + (up - 0.5) * torch.finfo(_read_as(part.dtype)).eps)


def otherwise_rounded(run: Callable[[torch.Generator], T]) -> list[Callable[[], T]]:
    """What ``run`` gives for one stream of directions of rounding after another, each computed when it is asked for.

    The source of a rewrite may be exact by luck. What these results err is an error that it may have been spared: all
    that a program which rounds can promise is the exact result of numbers that are one rounding away (N. Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 1.5).
    """
    return [cache(partial(_from_seed, run, seed)) for seed in range(_TRIES)]


def _from_seed(run: Callable[[torch.Generator], T], seed: int) -> T:
    return run(torch.Generator().manual_seed(seed))


def _read_as(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if is_float8(dtype) else dtype


def _move_of(exact: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """What rounding ``exact``, float64, to ``dtype`` by chance adds to it: nothing to numbers that ``dtype`` has."""
    last_place = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), torch.frexp(exact).exponent - 1)
    chance = torch.rand(exact.shape, generator=random, dtype=torch.float64).to(exact.device)
    rounded = (torch.floor(exact / last_place + chance) * last_place).to(dtype).double()
    # what overflows is the overflow's affair
    return torch.where(rounded.isfinite(), rounded - exact, 0.0)


class _Double(Interpreter):
    def __init__(self, graph: GraphModule, random: torch.Generator | None = None) -> None:
        super().__init__(graph)
        self._random = random

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        return result if self._random is None else self._rounded(n, result, facts.value(n), self._random)

    def _rounded(self, n: Node, result: Any, traced: Any, random: torch.Generator) -> Any:
        """A node's result, rounded where computing it rounds, and not where it is a part of another value."""
        if isinstance(result, (tuple, list)) and isinstance(traced, (tuple, list)):
            return type(result)(self._rounded(n, *each, random) for each in zip(result, traced, strict=True))
        if not (_is_computed(n) and isinstance(result, Tensor) and traced.is_floating_point()):
            return result
        move = _move_of(result.detach(), _read_as(traced.dtype), random)
        if not facts.is_mutating(n):
            return result + move
        # whoever else has the tensor must see it, except for autograd, which would take it for a change of what it kept
        result.data.add_(move)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        if target in _HALF_TO_FLOAT:
            args = (*args[:2], False)
        return super().call_function(target, map_aggregate(args, widened), map_aggregate(kwargs, widened))

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return _nested(found) if isinstance(found, GraphModule) else widened(found)


def _is_computed(node: Node) -> bool:
    """Whether a node computes its value, or casts it, and does not look at another's."""
    if not facts.is_aten(node):
        return False
    returned = [found.alias_info for found in node.target._schema.returns]  # type: ignore[union-attr]  # it is ATen's
    if any(info is not None and not info.is_write for info in returned):
        source = node.all_input_nodes[0]
        return facts.is_tensor(node) and facts.is_tensor(source) and facts.dtype(node) != facts.dtype(source)
    return True


def _nested(graph: GraphModule) -> Callable[..., Any]:
    """The body of a branch, loop or no-grad region, in float64 as well."""
    return lambda *arguments: _Double(graph).run(*map(widened, arguments))
