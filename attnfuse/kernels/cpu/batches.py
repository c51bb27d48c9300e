"""Any number of batch dimensions as the one that ATen's kernels have, and gradients summed back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnfuse.operands import Operands

__all__ = ["for_flash", "four_d", "gradients"]


def four_d(tensor: Tensor, batch: Sequence[int]) -> Tensor:
    """``[*B, H, M, D]`` with exactly one batch dimension."""
    if tensor.shape[:-3] != tuple(batch):
        tensor = tensor.expand(*batch, *tensor.shape[-3:])
    return tensor if len(batch) == 1 else tensor.reshape(-1, *tensor.shape[-3:])


def for_flash(tensor: Tensor, batch: Sequence[int]) -> Tensor:
    """As :func:`four_d`, the last dimension contiguous, which ATen's kernel takes for granted when called directly."""
    found = four_d(tensor, batch)
    return found if found.stride(-1) == 1 else found.contiguous()


def gradients(found: Sequence[Tensor], operands: Operands, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What a kernel's backward returns, of ATen's gradients of query, key and value; captures have none."""
    batch = operands.query.shape[:-3]
    wanted = zip(found, operands.qkv, needs[:3], strict=True)
    return (
        *(_summed(grad, x, batch) if need else None for grad, x, need in wanted),
        *(None for _ in operands.captures),
    )


def _summed(grad: Tensor, operand: Tensor, batch: Sequence[int]) -> Tensor:
    """The gradient of repeated heads and expanded batches, in the operand's shape."""
    heads = operand.shape[-3]
    grad = grad.view(*batch, *grad.shape[-3:])
    grad = grad if grad.shape[-3] == heads else grad.unflatten(-3, (heads, -1)).sum(-3)
    return grad.sum_to_size(operand.shape)
