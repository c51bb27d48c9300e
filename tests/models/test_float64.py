"""The judge is itself tried: its reference is float64 throughout, and it sees a small fault in any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.float64 import InFloat64, exact_copy, widened
from tests.models.zoo import MODELS, ZOO
from tests.support.compare import assert_as_good

NAMES = tuple(MODELS)


class Narrow(TorchDispatchMode):
    """Collects the operations whose result is a floating-point tensor of less than 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
        self.found.update(str(func) for x in made if x.dtype != torch.float64)
        return out


class Sharpened(TorchFunctionMode):
    """Attention with a fault: its logits are half a percent too large."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # a router's logits are 2-D
        if func in (torch.softmax, nn.functional.softmax, Tensor.softmax) and args[0].dim() > 2:
            args = (args[0] * 1.005, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_float64_throughout(name: str, model_of: Callable[..., nn.Module]) -> None:
    model = MODELS[name]
    exact, inputs = exact_copy(model_of(name, torch.float32)), widened(model.feed(model.paddings[-1]))
    with torch.no_grad(), InFloat64(), Narrow() as narrow:
        exact(**inputs)
    assert narrow.found == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_small_fault_in_attention_is_seen(
    name: str, model_of: Callable[..., nn.Module], judged: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    padding = MODELS[name].paddings[-1]
    source, exact = judged(name, torch.float32, padding)
    with torch.no_grad(), Sharpened():
        faulty = model_of(name, torch.float32)(**MODELS[name].feed(padding)).last_hidden_state
    assert_as_good(source, source, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good(faulty, source, exact)


@pytest.mark.parametrize("name", [model.name for model in ZOO if "left" in model.paddings])
def test_padding_reaches_the_output(name: str, judged: Callable[..., tuple[Tensor, Tensor]]) -> None:
    source, exact = judged(name, torch.float32, "none")
    padded, _ = judged(name, torch.float32, "left")
    with pytest.raises(AssertionError, match="error"):
        assert_as_good(padded, source, exact)
