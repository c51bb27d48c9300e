"""Attention problems from a description or an exported program, for asking which kernels could compute them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from attnfuse.errors import BadInput, BadProgram
from attnfuse.graph import facts
from attnfuse.kernels import Operand, Problem
from attnfuse.pt2 import rewrite
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Asked", "Sizes", "problem_of", "problems_in"]


@dataclass(frozen=True)
class Sizes:
    """Batch, query heads, key/value heads, query rows, keys, head size."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_size: int

    @staticmethod
    def parse(source: str) -> Sizes:
        """``B,H,Hkv,M,N,D``. Raises :class:`BadInput`."""
        parts = source.split(",")
        if len(parts) != 6 or not all(part.strip().isdigit() for part in parts):
            raise BadInput(f"{source!r} is not six sizes B,H,Hkv,M,N,D")
        sizes = Sizes(*map(int, parts))
        if sizes.kv_heads == 0 or sizes.heads % sizes.kv_heads:
            raise BadInput(f"{sizes.heads} query heads cannot share {sizes.kv_heads} key/value heads evenly")
        return sizes


@dataclass(frozen=True)
class Asked:
    """A problem, the name of its place, and the device its tensors are on."""

    name: str
    problem: Problem
    target: Target


def problem_of(source: str, sizes: Sizes, dtype: torch.dtype) -> Problem:
    """The problem that a spec's text, or a score program alone, is at these sizes. Raises :class:`BadProgram`."""
    spec = AttentionSpec.from_text(source) if source.lstrip().startswith("{") else AttentionSpec(score=parse(source))
    if spec.batch != 1 or spec.symbols:
        raise BadProgram(
            f"a spec with {spec.batch} batch axes and {spec.symbols} symbolic sizes needs a program, not sizes"
        )
    extent = dict(zip(spec.axes, (sizes.batch, sizes.heads, sizes.rows, sizes.keys), strict=True))
    captures = tuple(
        Operand(tuple(extent[axis] if axis in each.axes else 1 for axis in spec.axes), getattr(torch, each.dtype))
        for each in spec.captures
    )
    key = Operand((sizes.batch, sizes.kv_heads, sizes.keys, sizes.head_size), dtype)
    query = Operand((sizes.batch, sizes.heads, sizes.rows, sizes.head_size), dtype)
    return Problem(spec, query, key, key, captures)


def problems_in(program: ExportedProgram) -> Iterator[Asked]:
    """Every attention in a program that attnfuse recognises."""
    # whatever is recognised, some kernel for CPU computes it: no site is missing because a device has none
    fused, _ = rewrite(program, target="cpu", custom_op=True, certify="off", profit=False)
    for node in fused.graph.nodes:
        if node.target in (torch.ops.attnfuse.attention.default, torch.ops.attnfuse.attention_weights.default):
            query = facts.arguments(node)["query"]
            yield Asked(node.name, _problem_at(node), Target.of(facts.tensor(query).device))


def _problem_at(node: Node) -> Problem:
    given = facts.arguments(node)
    query, key = _operand(given["query"]), _operand(given["key"])
    value = _operand(given["value"]) if "value" in given else key.without_columns()
    spec = AttentionSpec.from_text(given["spec"])
    captures = tuple(map(_operand, given["captures"][: len(spec.captures)]))
    return Problem(spec, query, key, value, captures, weights="value" not in given)


def _operand(node: Node) -> Operand:
    return Operand(facts.hint(node), facts.dtype(node))
