"""Gradients of compiled models, every parameter's, as good as eager's against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models.doors import Spy, compiled
from tests.models.gradients import assert_all_as_good, exact_gradients, gradients
from tests.models.zoo import MODELS, Padding
from tests.support.compare import assert_as_good

Trainee = Callable[[str], nn.Module]


@pytest.fixture
def trainee(model_of: Callable[[str, torch.dtype], nn.Module]) -> Trainee:
    """``trainee(name)``: a float32 model of the test's own in training mode; no dropout is configured."""
    return lambda name: copy.deepcopy(model_of(name, torch.float32)).train()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5", "bloom", "gpt-oss"])
def test_gradients(name: str, padding: Padding, trainee: Trainee, spy: Spy) -> None:
    module, inputs = trainee(name), MODELS[name].feed(padding)
    fused = gradients(module, inputs, compiled(module))
    assert_all_as_good(fused, gradients(module, inputs), exact_gradients(module, inputs))
    spy.assert_all_fused(MODELS[name])


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("t5", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("swin", "encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table"),
        ("gpt-oss", "layers.0.self_attn.sinks"),
    ],
)
def test_a_parameter_inside_the_score_learns(name: str, parameter: str, trainee: Trainee, spy: Spy) -> None:
    module, inputs = trainee(name), MODELS[name].feed()
    source, exact = gradients(module, inputs)[parameter], exact_gradients(module, inputs)[parameter]
    assert source.abs().max() > 0
    assert_as_good(gradients(module, inputs, compiled(module))[parameter], source, exact)
    spy.assert_all_fused(MODELS[name])


def test_activation_checkpointing(trainee: Trainee, spy: Spy) -> None:
    module, inputs = trainee("llama"), MODELS["llama"].feed("left")
    source, exact = gradients(module, inputs), exact_gradients(module, inputs)
    module.gradient_checkpointing_enable()
    assert_all_as_good(gradients(module, inputs, compiled(module)), source, exact)
    spy.assert_all_fused(MODELS["llama"])
