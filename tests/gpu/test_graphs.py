"""CUDA graphs: each kernel is captured and replayed, alone and by ``mode="reduce-overhead"``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnfuse.backend import attnfuse
from attnfuse.kernels import lookup
from attnfuse.op import attention
from attnfuse.target import Target
from tests.kernels.cases import SPECS, Sizes, case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

KERNELS = ("gluon", "triton", "cudnn")
SIZES = Sizes((2,), 4, 2, 200, 200, 64, 64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_captured_call_computes_what_is_put_into_its_operands(kernel: str) -> None:
    given = case(SPECS["causal"], SIZES, torch.bfloat16)
    if lookup(kernel).reasons_against(given.problem(), Target.of(torch.device("cuda"))):
        pytest.skip("refused")
    operands = [x.cuda() for x in given.tensors[:3]]
    spec = given.spec.to_text()

    def call() -> Tensor:
        found: Tensor = attention(*operands, [], [], spec, kernel)[0]
        return found

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        for operand in operands:
            operand.normal_()
        graph.replay()
        torch.testing.assert_close(out, call(), rtol=0, atol=0)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * 0.125
    places = torch.arange(query.shape[-2], device=query.device)
    scores = scores.masked_fill(places[None, :] > places[:, None], -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reduce_overhead(kernel: str, training: bool) -> None:
    options = {"kernel": kernel, "profit": False}
    modes = {
        mode: torch.compile(causal, backend=_in_mode(options, mode), dynamic=False)
        for mode in (None, "reduce-overhead")
    }
    for _ in range(4):
        operands = [torch.randn(2, 4, 640, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        found = {mode: _results(call, operands, training=training) for mode, call in modes.items()}
        for with_graphs, without in zip(found["reduce-overhead"], found[None], strict=True):
            torch.testing.assert_close(with_graphs, without, rtol=0, atol=0)


def _in_mode(options: dict[str, object], mode: str | None) -> Callable[..., object]:
    # torch.compile takes a mode or options, not both
    return lambda graph, inputs: attnfuse(graph, inputs, mode=mode, options=options)


def _results(call: Callable[..., Tensor], operands: list[Tensor], *, training: bool) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(training) for x in operands]
    torch.compiler.cudagraph_mark_step_begin()
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out)) if training else ()
    return [x.detach().clone() for x in (out, *grads)]
