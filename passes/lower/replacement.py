"""What a site is replaced by, as a graph of its own: layouts, one fused node, the source's shape again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnfuse.graph import facts
from attnfuse.graph.build import Builder
from attnfuse.graph.strides import laid_out_like, matters
from attnfuse.kernels import Kernel, Problem
from attnfuse.op import attention as attention_op
from attnfuse.operands import Operands as OperandTensors
from attnfuse.passes.lower.operands import Operands, build_operands, nearest, restore
from attnfuse.passes.lower.quantise import with_quantised
from attnfuse.passes.site import Attention
from attnfuse.spec import AttentionSpec
from attnfuse.weights_op import attention_weights

__all__ = ["Draft", "draft", "finished"]

#: A dropout seed is drawn below this.
_SEEDS = 2**62


@dataclass(frozen=True)
class Draft:
    """A graph whose placeholders stand for ``inputs`` and which holds the operands of a site's fused node."""

    graph: Graph
    inputs: tuple[Node, ...]
    operands: Operands


def draft(attention: Attention, value: Callable[[Node], object] = facts.value) -> Draft:
    """The operands of ``attention``, built from its leaves, whose fake values are asked of ``value``."""
    inputs = tuple(dict.fromkeys(nearest(layout).node for layout in attention.layouts))
    graph = Graph()
    standing = {node: graph.placeholder(node.name) for node in inputs}
    for node, placeholder in standing.items():
        placeholder.meta["val"] = value(node)
    operands = build_operands(Builder(graph), attention, standing.__getitem__)
    if attention.quantised:
        operands = with_quantised(Builder(graph), operands, getattr(torch, str(attention.spec.weight_dtype)))
    return Draft(graph, inputs, operands)


def finished(attention: Attention, start: Draft, kernel: Kernel, problem: Problem, portable: bool) -> GraphModule:
    """The draft with the fused node, computed by ``kernel``; its own operations where inlined or ``portable``."""
    builder = Builder(start.graph)
    operands = start.operands
    if attention.spec.dropout:
        operands = _with_seed(builder, operands)
    if attention.value is None:
        out = _weights(builder, attention.spec, operands, kernel)
    elif portable or kernel.inlines(problem):
        out = _traced(builder, attention.spec, operands, kernel)
    else:
        out = _called(builder, attention.spec, operands, kernel, problem.training)
    result = restore(builder, attention, out)
    if matters(attention.site.node):
        result = laid_out_like(builder, result, attention.site.node)
    start.graph.output(result)
    return GraphModule(builder.modules, start.graph)


def _with_seed(builder: Builder, operands: Operands) -> Operands:
    device = facts.tensor(operands.query).device
    seed = builder.call(torch.ops.aten.randint.default, _SEEDS, [1], dtype=torch.int64, device=device)
    return replace(operands, captures=(*operands.captures, seed))


def _weights(builder: Builder, spec: AttentionSpec, operands: Operands, kernel: Kernel) -> Node:
    tensors = (operands.query, operands.key, list(operands.captures), list(operands.symbols))
    return builder.call(attention_weights.default, *tensors, spec.to_text(), kernel.name)


def _called(builder: Builder, spec: AttentionSpec, operands: Operands, kernel: Kernel, training: bool) -> Node:
    tensors = (operands.query, operands.key, *operands.values, list(operands.captures), list(operands.symbols))
    with_lse = training and kernel.saves_lse
    both = builder.call(attention_op.default, *tensors, spec.to_text(), kernel.name, with_lse)
    return builder.item(both, 0)


def _traced(builder: Builder, spec: AttentionSpec, operands: Operands, kernel: Kernel) -> Node:
    tensors = (operands.query, operands.key, *operands.values, *operands.captures)
    nodes = (*tensors, *(size for size in operands.symbols if isinstance(size, Node)))
    sizes = tuple(None if isinstance(size, Node) else size for size in operands.symbols)
    run = partial(_run, kernel, spec, len(operands.captures), sizes)
    trace = make_fx(run, tracing_mode="fake", pre_dispatch=True)(*map(facts.value, nodes))
    return builder.inline(trace, nodes)


def _run(
    kernel: Kernel, spec: AttentionSpec, captures: int, sizes: Sequence[int | None], *values: Tensor | int
) -> Tensor:
    query, key, value, *rest = values
    given = iter(rest[captures:])
    symbols = tuple(next(given) if size is None else size for size in sizes)
    return kernel.expand(spec, OperandTensors(query, key, value, tuple(rest[:captures]), symbols))  # type: ignore[arg-type]
