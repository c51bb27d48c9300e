"""The models, their sources' outputs and the float64 outputs, each made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from attnfuse import backend
from tests.models.doors import Spy
from tests.models.float64 import InFloat64, exact_copy, widened
from tests.models.zoo import MODELS, Padding


@pytest.fixture(scope="session")
def model_of() -> Callable[[str, torch.dtype], nn.Module]:
    """``model_of(name, dtype)``: a shared model; a test that trains must copy it."""
    return cache(lambda name, dtype: MODELS[name].make(dtype))


@pytest.fixture(scope="session")
def judged(
    model_of: Callable[[str, torch.dtype], nn.Module],
) -> Callable[[str, torch.dtype, Padding], tuple[Tensor, Tensor]]:
    """``judged(name, dtype, padding)``: the source's last hidden state, in its dtype and in float64."""

    @cache
    def run(name: str, dtype: torch.dtype, padding: Padding) -> tuple[Tensor, Tensor]:
        model, inputs = model_of(name, dtype), MODELS[name].feed(padding, dtype)
        with torch.no_grad():
            source = model(**inputs).last_hidden_state
            with InFloat64():
                return source, exact_copy(model)(**widened(inputs)).last_hidden_state

    return run


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compiled code is kept by code object, which all layers and dtypes share: eight would be too many."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """What the backend hands to ``fuse_graph`` and gets from it while this test runs."""
    watch = Spy()
    monkeypatch.setattr(backend, "fuse_graph", watch.wrap(backend.fuse_graph))
    return watch
