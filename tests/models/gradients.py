"""Gradients of a model, of a compiled one and of its float64 copy, and how they are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.float64 import InFloat64, exact_copy, widened
from tests.models.zoo import Inputs
from tests.support.compare import assert_as_good

__all__ = ["Gradients", "assert_all_as_good", "exact_gradients", "gradients"]

#: By parameter name.
Gradients = dict[str, Tensor]


def gradients(module: nn.Module, inputs: Inputs, run: Callable[..., Any] | None = None) -> Gradients:
    """Gradients of a fixed random projection of ``run(**inputs)`` to the parameters of ``module``.

    Those that the projection does not depend on (of an unused pooling layer) are zero, as compiled code has them.
    """
    module.zero_grad()
    out = (module if run is None else run)(**inputs).last_hidden_state
    # a plain sum would have no gradient: the last normalisation takes the mean away
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    (out * direction).sum().backward()
    parameters = dict(module.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def exact_gradients(module: nn.Module, inputs: Inputs) -> Gradients:
    """The same in float64."""
    with InFloat64():
        return gradients(exact_copy(module), widened(inputs))


def assert_all_as_good(fused: Gradients, source: Gradients, exact: Gradients) -> None:
    """Raises AssertionError unless ``fused`` has every gradient that ``source`` has, as good."""
    assert fused.keys() == source.keys() == exact.keys()
    fused, source, exact = (_by_module(each) for each in (fused, source, exact))
    faults = [f"{name}: {why}" for name in fused if (why := _fault(fused[name], source[name], exact[name]))]
    assert not faults, "\n".join(["gradients that are not as good:", *faults])


def _fault(fused: Tensor, source: Tensor, exact: Tensor) -> str:
    try:
        assert_as_good(fused, source, exact)
    except AssertionError as error:
        return str(error)
    return ""


def _by_module(each: Gradients) -> Gradients:
    # A weight and its bias are judged as one vector. The bias of a key projection adds the same to all
    # scores of a row, so its exact gradient is zero, and beside that nothing but noise could be compared.
    grouped: dict[str, list[Tensor]] = defaultdict(list)
    for name, gradient in each.items():
        grouped[name.rpartition(".")[0]].append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in grouped.items()}
