"""A Dynamo graph's trace: the same whether calls are run or only looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from attnfuse.graph import facts, mirror
from attnfuse.graph.capture import Captured, capture


def dynamo_graph(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> GraphModule:
    found: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return found[0]


def masked(q: Tensor, k: Tensor) -> Tensor:
    rows, keys = torch.arange(q.size(-2))[:, None], torch.arange(k.size(-2))[None]
    fill = torch.tensor(-1e4)
    scores = torch.where(keys <= rows, q @ k.mT * 0.3, fill)
    return torch.softmax(scores + torch.zeros_like(scores), dim=-1) @ k


def split(q: Tensor, k: Tensor) -> Tensor:
    a, b = torch.cat([q, k], dim=-1).split(8, dim=-1)
    top = (a @ b.mT).max(dim=-1, keepdim=True)
    return F.pad(q[..., None, :, 1:], (1, 0)).squeeze(-3) * top.values + top.indices


def sliced(q: Tensor, k: Tensor) -> Tensor:
    """The last slice leaves nothing out of what the first one leaves."""
    return q[:, :, :4, :4] @ k[:, :2, :4][:, :1, :, :4].mT + q[None, :, :1, :4, :4][0]


def in_place(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    scores += 1.0
    scores[..., 0] = 0.0
    scores.mul_(2.0).tanh_()
    return scores @ k


def reshaped_in_place(q: Tensor, k: Tensor) -> Tensor:
    flat = q * 2
    before = flat @ k.mT
    return before + flat.transpose_(-1, -2).mT @ k.mT


class Opened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = self.attention(q[0], k[0], k[0], need_weights=False)[0]
        return out


PROGRAMS: dict[str, Callable[..., Any]] = {
    "masked": masked,
    "split": split,
    "sliced": sliced,
    "in place": in_place,
    "reshaped in place": reshaped_in_place,
    "opened": Opened(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_looking_at_a_call_traces_what_running_it_does(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    graph = dynamo_graph(PROGRAMS[name], *args, dynamic=dynamic)
    looked = capture(graph)
    monkeypatch.setattr(mirror, "_keeps_metadata", lambda graph: False)
    assert _described(looked) == _described(capture(graph))


def _described(captured: Captured) -> list[tuple[Any, ...]]:
    """What each node computes of which others, its value, and whose value that is; nodes by their number."""
    numbers = {node: at for at, node in enumerate(captured.aten.nodes)}
    return [
        (
            str(node.target) if node.op == "call_function" else node.op,
            map_aggregate(
                (node.args, node.kwargs), lambda x: numbers.get(x, str(x)) if isinstance(x, Node) else str(x)
            ),
            _value(node),
            str(captured.home.get(node)),
        )
        for node in captured.aten.nodes
    ]


def _value(node: Node) -> tuple[Any, ...]:
    if not facts.is_tensor(node):
        return ()
    return facts.dtype(node), facts.shape(node), tuple(map(facts.size_of, facts.tensor(node).stride()))


def test_fake_kernels_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = dynamo_graph(lambda q, k: torch.softmax(q @ k.mT * 0.3, dim=-1) @ k, *(torch.randn(2, 4, 6, 8),) * 2)
    run: list[str] = []
    right = mirror.Interpreter.run_node
    monkeypatch.setattr(mirror.Interpreter, "run_node", lambda self, n: run.append(n.op) or right(self, n))
    nodes = [node.target for node in capture(graph).aten.nodes if node.op == "call_function"]
    assert len(nodes) == 5
    assert "call_function" not in run
