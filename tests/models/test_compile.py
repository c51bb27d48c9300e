"""``torch.compile(model, backend="attnfuse")`` for inference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnfuse.backend import attnfuse
from tests.models.doors import CASES, Spy, assert_all_fused, compiled
from tests.models.float64 import InFloat64, exact_copy, widened
from tests.models.zoo import MODELS, Inputs, Model, Padding
from tests.support.compare import assert_as_good


@pytest.mark.parametrize(("model", "dtype", "paddings"), CASES)
def test_every_site_is_fused_and_as_good(
    model: Model,
    dtype: torch.dtype,
    paddings: tuple[Padding, ...],
    model_of: Callable[..., nn.Module],
    judged: Callable[..., tuple[Tensor, Tensor]],
    spy: Spy,
) -> None:
    run = compiled(model_of(model.name, dtype))
    for padding in paddings:
        with torch.no_grad():
            fused = run(**model.feed(padding, dtype)).last_hidden_state
        assert_as_good(fused, *judged(model.name, dtype, padding))
    spy.assert_all_fused(model)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_new_length_needs_no_new_graph(name: str, model_of: Callable[..., nn.Module], spy: Spy) -> None:
    model, source = MODELS[name], model_of(name, torch.float32)
    run = compiled(source, dynamic=True)
    with torch.no_grad():
        run(**model.feed("left"))
        with torch.compiler.set_stance("fail_on_recompile"):
            fused = [run(**model.feed("left", length=length)).last_hidden_state for length in (11, 15)]
    for out, length in zip(fused, (11, 15), strict=True):
        assert_as_good(out, *in_both(source, model.feed("left", length=length)))
    spy.assert_all_fused(model)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast(
    name: str, model_of: Callable[..., nn.Module], judged: Callable[..., tuple[Tensor, Tensor]], spy: Spy
) -> None:
    model, source = MODELS[name], model_of(name, torch.float32)
    run, inputs = compiled(source), model.feed("right")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused, eager = run(**inputs).last_hidden_state, source(**inputs).last_hidden_state
    _, exact = judged(name, torch.float32, "right")
    assert_as_good(fused, eager, exact)
    spy.assert_all_fused(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_inductor_around_the_kernels_that_are_chosen(
    name: str, model_of: Callable[..., nn.Module], judged: Callable[..., tuple[Tensor, Tensor]], spy: Spy
) -> None:
    run = compiled(model_of(name, torch.float32), kernel=None, inner="inductor")
    with torch.no_grad():
        fused = run(**MODELS[name].feed("left")).last_hidden_state
    assert_as_good(fused, *judged(name, torch.float32, "left"))
    assert_all_fused(spy.reports[0], MODELS[name])


@pytest.mark.parametrize(
    ("mode", "options"), [("reduce-overhead", {}), ("default", {}), (None, {"epilogue_fusion": False})]
)
def test_inductor_gets_its_mode_and_options(mode: str | None, options: dict[str, bool]) -> None:
    seen: list[object] = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT, dim=-1) @ value

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        run = attnfuse(graph, inputs, mode=mode, options={**options, "kernel": "blocked", "profit": False})
        seen.extend(site.kernel for site in graph.meta["attnfuse_report"].fused)
        return run

    query, key, value = torch.randn(3, 1, 2, 8, 16)
    out = torch.compile(attention, backend=backend)(query, key, value)
    torch.testing.assert_close(out, attention(query, key, value))
    assert seen == ["blocked"]


def in_both(source: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The source's last hidden state as it is, and in float64."""
    with torch.no_grad():
        out = source(**inputs).last_hidden_state
        with InFloat64():
            return out, exact_copy(source)(**widened(inputs)).last_hidden_state
