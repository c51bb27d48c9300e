"""A call of flex_attention in a Dynamo graph: what it computes, as one callable that can be read and replayed.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html: the score of a pair is scaled, goes through
``score_mod``, and is -inf where ``mask_mod`` says no; a row that keeps no key is zero. Besides, a block mask lists
which blocks of pairs are looked at, and in which of them ``mask_mod`` is not asked. Only where that list is shown to
leave the result of ``mask_mod`` as it is does ``mask_mod`` say what the call computes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes  # torch offers no public way to leave all modes

from attnfuse.graph import facts

__all__ = ["Flex", "flex_of", "flex_programs", "is_flex"]

log = logging.getLogger(__name__)

#: A mask of more pairs is not compared with its blocks.
_MOST_PAIRS = 1 << 27


@dataclass(frozen=True, eq=False)
class Flex:
    """The call as a function of query, key, value ``[B, H, N, D]``, ``score_mod``'s captures and ``mask_mod``'s.

    ``unproven`` says why the block mask may say something else than ``mask_mod``; empty where it does not.
    """

    score_mod: GraphModule
    mask_mod: GraphModule
    scale: float
    score_captures: int
    unproven: str = ""
    __name__: str = field(default="flex_attention", init=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *captures: Tensor) -> tuple[Tensor]:
        """The result alone, written out."""
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        score = query.to(wide) @ key.to(wide).mT * self.scale
        where = _positions(score.shape, score.device)
        score = self.score_mod(score, *where, *captures[: self.score_captures])
        keep = self.mask_mod(*where, *captures[self.score_captures :])
        weight = torch.ops.aten._safe_softmax.default(torch.where(keep, score, float("-inf")), -1)
        return ((weight @ value.to(wide)).to(query.dtype),)


def is_flex(node: Node) -> bool:
    """Whether a node of a Dynamo graph calls flex_attention."""
    return node.target is torch.ops.higher_order.flex_attention


def flex_of(node: Node, module: GraphModule) -> tuple[Flex, tuple[Node, ...]]:
    """The call that a node of ``module`` makes, and the nodes of its operands and captures."""
    query, key, value, score_mod, blocks, scale, _, of_score, of_mask = node.args
    score, mask = (_graph_of(part, module) for part in (score_mod, blocks[-1]))  # type: ignore[index]
    reason = _unproven(node, module, blocks, mask, of_mask)  # type: ignore[arg-type]
    captures: tuple[Any, ...] = (*of_score, *of_mask)  # type: ignore[misc]
    return Flex(score, mask, float(scale), len(of_score), reason), (query, key, value, *captures)  # type: ignore[arg-type]


def flex_programs(module: GraphModule) -> tuple[GraphModule, ...]:
    """The programs that calls of flex_attention in ``module`` are given: graphs of numbers, which hold no attention."""
    named = (
        arg for node in module.graph.nodes if is_flex(node) for arg in node.all_input_nodes if arg.op == "get_attr"
    )
    found = (getattr(module, str(node.target), None) for node in named)
    return tuple(program for program in found if isinstance(program, GraphModule))


def _graph_of(node: object, module: GraphModule) -> GraphModule:
    assert isinstance(node, Node)
    return cast("GraphModule", module.get_submodule(str(node.target)))


def _positions(shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    rank = len(shape)
    return tuple(
        torch.arange(size, device=device).view(*(-1 if at == axis else 1 for at in range(rank)))
        for axis, size in enumerate(shape)
    )


# --- whether the block mask says what mask_mod says -------------------------------------------------


def _unproven(
    node: Node, module: GraphModule, blocks: Sequence[Any], mask: GraphModule, captures: Sequence[Node]
) -> str:
    listed = [part for part in (*blocks[2:6], *captures) if isinstance(part, Node)]
    if any(_depends(part) for part in listed):
        return "its block mask is handed to the graph or made of its inputs: its blocks may not be those of mask_mod"
    query, key = (facts.tensor(arg) for arg in node.args[:2] if isinstance(arg, Node))
    shape = (*query.shape[:-1], key.shape[-2])
    if not all(isinstance(size, int) for size in shape):
        return "its block mask cannot be compared with mask_mod at sizes that are symbolic"
    batch, heads = (size if asked.users else 1 for size, asked in zip(shape[:2], mask.graph.nodes, strict=False))
    if batch * heads * shape[2] * shape[3] > _MOST_PAIRS:
        return "its mask is too large to be compared with its blocks"
    try:
        with _disable_current_modes(), torch.no_grad():
            same = _says_the_same(_Constants(module).values(node), blocks, mask, captures, (batch, heads, *shape[2:]))
    except Exception as error:  # whatever the user's program raises; the call then stays as it is
        log.debug("comparing a block mask with its mask_mod failed", exc_info=True)
        return f"its block mask cannot be compared with mask_mod: {type(error).__name__}: {error}".partition("\n")[0]
    return "" if same else "its block mask leaves out or adds pairs that mask_mod does not"


def _says_the_same(
    known: dict[Node, Tensor], blocks: Sequence[Any], mask: GraphModule, captures: Sequence[Node], shape: Sequence[int]
) -> bool:
    counts, indices = known[blocks[2]], known[blocks[3]]
    full_counts, full_indices = (known.get(part) for part in blocks[4:6])
    keep = mask(*_positions(shape, indices.device), *(known[capture] for capture in captures)).expand(*shape)
    looked_at = _listed(counts, indices, blocks[-3:-1], shape[2:])
    whole = _listed(full_counts, full_indices, blocks[-3:-1], shape[2:])
    return bool((((looked_at & keep) | whole) == keep).all())


def _depends(node: Node) -> bool:
    """Whether a node's value is made of the graph's inputs or attributes."""
    seen, stack = {node}, [node]
    while stack:
        found = stack.pop()
        # an attribute may be written to between two calls
        if found.op == "placeholder" or (found.op == "get_attr" and facts.is_tensor(found)):
            return True
        stack += [arg for arg in found.all_input_nodes if arg not in seen]
        seen.update(found.all_input_nodes)
    return False


class _Constants(Interpreter):
    """Runs what comes before a node and is made of no input."""

    def values(self, node: Node) -> dict[Node, Tensor]:
        open_: set[Node] = set()
        for each in self.module.graph.nodes:  # type: ignore[union-attr]
            if each is node:
                break
            if each.op == "placeholder" or any(arg in open_ for arg in each.all_input_nodes):
                open_.add(each)
                if _may_write(each) and any(arg in self.env for arg in each.all_input_nodes):
                    raise ValueError(f"{each.name} may write into a constant")
                continue
            self.env[each] = self.run_node(each)
        return self.env


#: The in-place operators of Python, as Dynamo calls them.
_IN_PLACE = ("setitem", *(f"i{op}" for op in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow")))


def _may_write(node: Node) -> bool:
    name = str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))
    return name in _IN_PLACE or name.endswith("_") or "out" in node.kwargs


def _listed(counts: Tensor | None, indices: Tensor | None, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The pairs in blocks that a block mask lists, ``[B, H, M, N]``; of each row of blocks the first ``counts``."""
    if counts is None or indices is None:
        return torch.tensor(False)
    rows, columns = indices.shape[-2:]
    named = torch.arange(columns, device=indices.device) < counts[..., None]
    chosen = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, torch.where(named, indices, columns).long(), torch.ones_like(named))
    row, column = (
        (torch.arange(size, device=indices.device) // step).clamp(max=last - 1)
        for size, step, last in zip(shape, block, (rows, columns), strict=True)
    )
    return chosen[..., row[:, None], column[None, :]]
