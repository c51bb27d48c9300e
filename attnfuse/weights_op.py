"""The operator ``attnfuse::attention_weights``: attention up to its weights, for programs that want them.

::

    attention_weights(query, key, captures, symbols, spec, kernel) -> weights

It is a second operator and not a second result of :mod:`attnfuse.op`: the weights are written to memory either way, so
that the product with the values may stay a matrix product of the graph's, and whatever else is done with the weights
(returned, averaged, dropped out, hooked, written into) happens to a tensor as it did in the source. What is saved is
the scores, which are neither written nor read.

``spec`` is :meth:`attnfuse.spec.AttentionSpec.to_text`, ``kernel`` a registered name; shapes are those of
:mod:`attnfuse.spec`, any strides. ``weights [*B, H, M, N]`` and all gradients are contiguous. The backward computes the
weights anew: they may have been rounded, and written into.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attnfuse.kernels import lookup
from attnfuse.op import register
from attnfuse.operands import Operands
from attnfuse.reference import weights_dtype
from attnfuse.spec import AttentionSpec

__all__ = ["attention_weights"]

# in its own fragment, beside the definitions of attnfuse.op
_LIBRARY = Library("attnfuse", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "attention_weights(Tensor query, Tensor key, Tensor[] captures, SymInt[] symbols, str spec, str kernel) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_weights_backward(Tensor grad, Tensor query, Tensor key, Tensor[] captures, SymInt[] symbols, str spec, "
    "str kernel, bool[] needs) -> Tensor[] gradients",
    tags=_TAGS,
)

_spec = lru_cache(maxsize=4096)(AttentionSpec.from_text)


def _weights(
    query: Tensor, key: Tensor, captures: Sequence[Tensor], symbols: Sequence[int], spec: str, kernel: str
) -> Tensor:
    operands = Operands.of_weights(query, key, tuple(captures), tuple(symbols))
    return lookup(kernel).weights(_spec(spec), operands)


def _weights_fake(
    query: Tensor, key: Tensor, captures: Sequence[Tensor], symbols: Sequence[int], spec: str, kernel: str
) -> Tensor:
    return query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=weights_dtype(_spec(spec), query.dtype))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    operands = Operands.of_weights(query, key, tuple(captures), tuple(symbols))
    found = lookup(kernel).weights_backward(_spec(spec), grad, operands, needs)
    return [each.contiguous() for each in found if each is not None]


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip((query, key, *captures), needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, captures, ctx.symbols, ctx.spec, ctx.kernel = inputs
    ctx.save_for_backward(query, key, *captures)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, *captures = ctx.saved_tensors
    for_query, for_key, for_captures, for_symbols, *others = ctx.needs_input_grad
    needs = [for_query, for_key, *for_captures]
    backward = torch.ops.attnfuse.attention_weights_backward
    found = iter(backward(grad, query, key, captures, ctx.symbols, ctx.spec, ctx.kernel, needs))
    grads = [next(found) if needed else None for needed in needs]
    # torch takes an empty list of sizes for an empty list of tensors
    return (*grads[:2], grads[2:], [] if isinstance(for_symbols, list) else None, *(None for _ in others))


register(
    _LIBRARY,
    "attention_weights",
    2,
    (_weights, _weights_fake),
    (_backward, _backward_fake),
    (_autograd, _setup_context),
)

attention_weights = torch.ops.attnfuse.attention_weights
