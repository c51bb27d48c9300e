"""``attnfuse.rewrite`` on exported programs, through a saved and loaded ``.pt2``."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import attnfuse
from tests.models.doors import CASES, OPTIONS, assert_all_fused
from tests.models.zoo import MODELS, Inputs, Model, Padding
from tests.support.compare import assert_as_good


@pytest.mark.parametrize(("model", "dtype", "paddings"), CASES)
def test_every_site_is_fused_and_as_good(
    model: Model,
    dtype: torch.dtype,
    paddings: tuple[Padding, ...],
    model_of: Callable[..., nn.Module],
    judged: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    program = exported(model_of(model.name, dtype), model.feed(paddings[0], dtype))
    fused, report = attnfuse.rewrite(program, **OPTIONS)
    assert_all_fused(report, model)
    run = reloaded(fused).module()
    for padding in paddings:
        with torch.no_grad():
            out = run(**model.feed(padding, dtype)).last_hidden_state
        assert_as_good(out, *judged(model.name, dtype, padding))


@pytest.mark.parametrize("custom_op", [False, True], ids=["aten", "custom_op"])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5", "swin", "gpt-oss"])
def test_core_aten(
    name: str, custom_op: bool, model_of: Callable[..., nn.Module], judged: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = MODELS[name]
    padding = model.paddings[-1]
    inputs = model.feed(padding)
    program = exported(model_of(name, torch.float32), inputs).run_decompositions()
    fused, report = attnfuse.rewrite(program, custom_op=custom_op, kernel="blocked", **OPTIONS)
    assert_all_fused(report, model)
    ours = [node for node in fused.graph.nodes if "attnfuse" in str(node.target)]
    assert len(ours) == (model.sites if custom_op else 0)
    with torch.no_grad():
        out = reloaded(fused).module()(**inputs).last_hidden_state
    assert_as_good(out, *judged(name, torch.float32, padding))


def exported(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (), dict(inputs))


def reloaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)
