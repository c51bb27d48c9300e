"""What reaches the kernel when other compilers have had the graph: the strides that were chosen."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnfuse import fuse, fuse_graph
from tests.place.conftest import Picky
from tests.place.programs import WIDTH, B, N, attend, heads

CHOSEN = {"profit": False, "certify": "off", "target": "cuda:sm90"}


class FromAnActivation(nn.Module):
    """A pointwise operation behind the linear layer, whose result the compiler lays out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        value = torch.nn.functional.silu(self.value(x))
        return attend(heads(self.query(x)), heads(self.key(x)), heads(value) * 2)


class FromANarrowInput(FromAnActivation):
    """A copy is cheapest before the cast, where a compiler fuses it with what follows."""

    def forward(self, x: Tensor) -> Tensor:
        value = heads(x.to(torch.bfloat16)).float() + 1
        return attend(heads(self.query(x)), heads(self.key(x)), value)


@pytest.mark.parametrize("make", [FromAnActivation, FromANarrowInput])
@pytest.mark.parametrize("training", [False, True])
def test_inductor_keeps_the_strides(make: Callable[[], nn.Module], training: bool, picky: Picky) -> None:
    torch.compiler.reset()
    # of whole multiples of a bfloat16 step: Inductor leaves out casts there and back
    module, x = make(), torch.randn(B, N, WIDTH).bfloat16().float()
    compiled = torch.compile(module, backend="attnfuse", options={"kernel": picky(), **CHOSEN})
    with torch.set_grad_enabled(training):
        picky.seen.clear()
        ours = compiled(x)
        assert picky.layouts("value") == {"n"}
        theirs = module(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if training:
        parameters = tuple(module.parameters())
        grads = [torch.autograd.grad(out.square().sum(), parameters, allow_unused=True) for out in (ours, theirs)]
        for mine, true in zip(*grads, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_eighty_layers_take_under_two_seconds(picky: Picky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extraction, solution, new plans and edits, in seconds of this process: others may load the machine."""
    hf = pytest.importorskip("transformers")
    widths: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    options: dict[str, Any] = {"num_key_value_heads": 2, "attn_implementation": "eager", "use_cache": False}
    model = hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=80, **widths, **options)).eval()
    seconds: list[float] = []
    for step in ("place", "rearrange", "refreshed"):
        monkeypatch.setattr(fuse, step, timed(getattr(fuse, step), seconds))

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        report = fuse_graph(graph, inputs, kernel=picky(), **CHOSEN).meta["attnfuse_report"]
        assert [site.layouts["value"] for site in report.fused] == ["n"] * 80
        return graph.forward

    torch.compiler.reset()
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert len(seconds) == 3
    assert sum(seconds) < 2.0


def timed(step: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        # the garbage of other tests is not to be collected meanwhile
        gc.collect()
        started = time.process_time()
        try:
            return step(*arguments)
        finally:
            seconds.append(time.process_time() - started)

    return call
