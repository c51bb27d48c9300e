"""Runs a model in float64 throughout: what its source and its rewritten form are both judged against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["InFloat64", "exact_copy", "widened"]

NARROW = (torch.float16, torch.bfloat16, torch.float32)


class InFloat64(TorchFunctionMode):
    """Carries out a program in float64 even where it asks for less.

    ``model.double()`` is not enough: models upcast to float32 by name (norms, rotary angles, the softmax),
    which for a float64 run is a rounding, and the reference would be no better than what it judges.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args, kwargs = tree_map(_wide_dtype, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def exact_copy(model: nn.Module) -> nn.Module:
    """``model`` with its very weights in float64; to be called under :class:`InFloat64`."""
    return copy.deepcopy(model).double()


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, floating-point ones in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
