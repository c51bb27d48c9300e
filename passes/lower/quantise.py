"""Attention that is quantised on request: its operands are rounded to float8, with a scale a head, found as it runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from attnfuse.algebra import normalise
from attnfuse.axes import divided, same_size
from attnfuse.form import weight_factor
from attnfuse.graph import facts
from attnfuse.graph.build import Builder, UnknownSize
from attnfuse.kernels.float8 import quantised_to
from attnfuse.passes.lower.operands import Operands
from attnfuse.passes.site import Attention
from attnfuse.reference import name_of
from attnfuse.score import Capture, Expr, S, apply, rewrite
from attnfuse.spec import AttentionSpec, Captured
from attnfuse.target import Target

__all__ = ["quantised", "with_quantised"]

_ATEN = torch.ops.aten

#: The least that an operand is divided by: one of nothing but zeros stays so.
_LEAST = 1e-30


def quantised(attention: Attention, target: Target) -> Attention | None:
    """The attention in float8; None where a target multiplies none, or the attention is not of half types, or gives
    its weights.
    """
    spec, dtype = attention.spec, quantised_to(target)
    halves = {torch.bfloat16, torch.float16}
    able = spec.normaliser == "softmax" and weight_factor(spec.weight) is not None and attention.value is not None
    if dtype is None or not able or not {layout.dtype for layout in attention.operands} <= halves:
        return None
    scaled = _scaled(spec, name_of(dtype), name_of(facts.dtype(attention.site.node)))
    return replace(attention, spec=scaled, quantised=True)


def _scaled(spec: AttentionSpec, dtype: str, out: str) -> AttentionSpec:
    """The spec with three more captures: the scales of query, key and value, of each batch and query head."""
    captures = (*spec.captures, *(Captured(spec.axes[:-2], "float32") for _ in range(3)))
    query, key, value = (Capture(len(spec.captures) + place) for place in range(3))
    dot = apply("mul", apply("mul", query, key), S)

    def kind_of(slot: int) -> str:
        return captures[slot].kind

    score: Expr = rewrite(spec.score, lambda part: dot if part == S else part)
    return replace(
        spec,
        score=normalise(score, kind_of),
        weight=normalise(apply("mul", value, spec.weight), kind_of),
        captures=captures,
        weight_dtype=dtype,
        out_dtype=out,
    )


def with_quantised(builder: Builder, operands: Operands, dtype: torch.dtype) -> Operands:
    """The operands rounded to ``dtype``, and their scales ``[*B, H, 1, 1]`` behind the other captures."""
    pairs = [_rounded(builder, node, dtype) for node in (operands.query, operands.key, *operands.values)]
    (query, key, value), scales = zip(*pairs, strict=True)
    of_heads = (_of_query_heads(builder, scale, operands.query) for scale in scales)
    return Operands(query, key, (value,), (*operands.captures, *of_heads), operands.symbols)


def _rounded(builder: Builder, node: Node, dtype: torch.dtype) -> tuple[Node, Node]:
    """A node in float8, and the scale of each of its own heads: one that is loud must not make the others coarse."""
    largest = torch.finfo(dtype).max
    wide = builder.call(_ATEN.to.dtype, node, torch.float32)
    top = builder.call(_ATEN.amax.default, builder.call(_ATEN.abs.default, wide), [-2, -1], True)
    scale = builder.call(_ATEN.clamp.default, builder.call(_ATEN.div.Scalar, top, largest), _LEAST)
    units = builder.call(_ATEN.div.Tensor, wide, scale)
    return builder.call(_ATEN.to.dtype, builder.call(_ATEN.clamp.default, units, -largest, largest), dtype), scale


def _of_query_heads(builder: Builder, scale: Node, query: Node) -> Node:
    """The scales of an operand as the query's heads read them, which may share key heads and have more batches.

    Raises :class:`UnknownSize` where it is not known how many share one.
    """
    own, wanted = facts.shape(scale)[:-2], facts.shape(query)[:-2]
    if own[-1] != 1 and not same_size(own[-1], wanted[-1]):
        sharing = divided(wanted[-1], own[-1])
        if sharing is None:
            raise UnknownSize(f"how many heads share one of {own[-1]} is not known")
        scale = builder.call(_ATEN.repeat_interleave.self_int, scale, builder.size(sharing), len(own) - 1)
    if all(map(same_size, own[:-1], wanted[:-1])) and (own[-1] != 1 or wanted[-1] == 1):
        return scale
    return builder.call(_ATEN.expand.default, scale, [*map(builder.size, wanted), 1, 1])
