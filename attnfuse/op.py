"""The operator ``attnfuse::attention``: schema, shapes, gradients, autocast, and dispatch to a kernel.

::

    attention(query, key, value, captures, symbols, spec, kernel, return_lse=False) -> (out, lse)

``spec`` is :meth:`attnfuse.spec.AttentionSpec.to_text`, ``kernel`` a registered name; shapes are those of
:mod:`attnfuse.spec`, any strides. The operator is a pure function of its operands:

- *Dropout*: when ``spec.dropout > 0`` there is one capture more than the spec names, the last: the
  seed, an int64 tensor of one element on any device (``torch.randint(2**62, (1,))`` in the graph). Forward
  and backward draw the same mask from it (:mod:`attnfuse.dropout`).
- *Layout*: ``out`` lies in memory as ``[*B, M, H, Dv]``, contiguous: ``out.transpose(-3, -2)`` is what
  an output projection reads, without a copy. So do the gradients of query, key and value; the gradients
  of captures are contiguous. ``lse`` is float32 ``[*B, H, M]``, contiguous, of shape ``[0]`` when it is not asked
  for, and zero without a softmax.
- *Autocast* casts query, key and value to the autocast type, but for float8, and leaves the captures alone: a mask of
  float32's finfo.min would become -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attnfuse.kernels import lookup
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.operands import Operands
from attnfuse.reference import out_dtype
from attnfuse.spec import AttentionSpec

__all__ = ["attention", "register"]

#: What an operator computes and what its result is like; or a backward and what it keeps.
Pair = tuple[Callable[..., Any], Callable[..., Any]]

_LIBRARY = Library("attnfuse", "DEF")
# kernels read any strides, but how fast depends on them: those that the graph chose are to reach the kernel
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] captures, SymInt[] symbols, str spec, str kernel, "
    "bool return_lse=False) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor[] captures, SymInt[] symbols, str spec, str kernel, bool[] needs) -> Tensor[] gradients",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)

_spec = lru_cache(maxsize=4096)(AttentionSpec.from_text)


# --- forward ----------------------------------------------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    operands = Operands(query, key, value, tuple(captures), tuple(symbols))
    if return_lse:
        out, lse = _with_lse(kernel).run_with_lse(_spec(spec), operands)
        return _token_major(out), lse.contiguous()
    return _token_major(lookup(kernel).run(_spec(spec), operands)), query.new_empty(0, dtype=torch.float32)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    out = _empty_token_major(query, (*query.shape[:-1], value.shape[-1]), out_dtype(_spec(spec), value.dtype))
    return out, query.new_empty(query.shape[:-1] if return_lse else 0, dtype=torch.float32)


def _with_lse(name: str) -> Kernel:
    """The kernel of that name, or the one that computes everything where that one knows no lse."""
    chosen = lookup(name)
    return chosen if chosen.gives_lse else lookup("blocked")


def _is_lse(lse: Tensor) -> bool:
    """Whether it was asked for: ``[*B, H, M]``, not ``[0]``."""
    return lse.dim() > 1


def _token_major(tensor: Tensor) -> Tensor:
    """``tensor [*B, H, M, D]`` laid out as ``[*B, M, H, D]``; a copy only where it is not yet so."""
    tokens = tensor.transpose(-3, -2)
    if tokens.is_contiguous() and 1 not in tensor.shape:
        return tensor
    # the round trip through one dimension gives dimensions of size 1 the strides that the fake has
    return tokens.reshape(-1).view(tokens.shape).transpose(-3, -2)


def _empty_token_major(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    *batch, heads, rows, size = shape
    return like.new_empty((*batch, rows, heads, size), dtype=dtype).transpose(-3, -2)


# --- backward ---------------------------------------------------------------------------------------


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    chosen = lookup(kernel) if grad_lse is None else _with_lse(kernel)
    operands = Operands(query, key, value, tuple(captures), tuple(symbols))
    residual = Residual(out, lse if _is_lse(lse) else None, grad_lse)
    found = chosen.backward(_spec(spec), grad_out, operands, needs, residual)
    return [
        _token_major(grad) if place < 3 else grad.contiguous() for place, grad in enumerate(found) if grad is not None
    ]


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    spec: str,
    kernel: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    operands = zip((query, key, value, *captures), needs, strict=True)
    return [
        _empty_token_major(x, x.shape, x.dtype) if place < 3 else x.new_empty(x.shape)
        for place, (x, needed) in enumerate(operands)
        if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, captures, ctx.symbols, ctx.spec, ctx.kernel, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, *captures)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *captures = ctx.saved_tensors
    # the dispatcher drops a last argument that equals its default: there are as many gradients as it left inputs
    for_query, for_key, for_value, for_captures, for_symbols, *others = ctx.needs_input_grad
    needs = [for_query, for_key, for_value, *for_captures]
    grads: list[Tensor | None] = [None] * len(needs)
    grad_lse = grad_lse if _is_lse(lse) else None
    if grad_out is not None or grad_lse is not None:
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = iter(
            torch.ops.attnfuse.attention_backward(
                grad_out, grad_lse, query, key, value, out, lse, captures, ctx.symbols, ctx.spec, ctx.kernel, needs
            )
        )
        grads = [next(found) if needed else None for needed in needs]
    # torch takes an empty list of sizes for an empty list of tensors
    return (*grads[:3], grads[3:], [] if isinstance(for_symbols, list) else None, *(None for _ in others))


# --- registration -----------------------------------------------------------------------------------


def _autocast(device: str, key: str, name: str, count: int) -> Any:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(*given: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        # float64 is left alone, and so are numbers that are narrower already
        operands = [x if x.dtype == torch.float64 or x.itemsize == 1 else x.to(dtype) for x in given[:count]]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return getattr(torch.ops.attnfuse, name)(*operands, *given[count:], **options)

    return cast


def register(library: Library, name: str, operands: int, forward: Pair, backward: Pair, autograd: Pair) -> None:
    """An operator and its backward, each with its fake; autocast casts the first ``operands`` arguments.

    ``autograd`` is the backward for autograd, and what it needs set up.
    """
    for device in ("cpu", "cuda", "xpu"):
        key = f"Autocast{device.upper()}"
        library.impl(name, _autocast(device, key, name, operands), key)
    for each, (real, fake) in ((name, forward), (f"{name}_backward", backward)):
        library.impl(each, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attnfuse::{each}", fake, lib=library)
    differentiate, setup = autograd
    torch.library.register_autograd(f"attnfuse::{name}", differentiate, setup_context=setup, lib=library)


register(
    _LIBRARY, "attention", 3, (_attention, _attention_fake), (_backward, _backward_fake), (_autograd, _setup_context)
)

attention = torch.ops.attnfuse.attention
