"""Attention inside a call that Dynamo keeps whole, beside regions whose bodies are graphs of their own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from attnfuse import explain, fuse_graph
from attnfuse.graph.copies import copied
from attnfuse.graph.text import render
from attnfuse.report import Report
from tests.support.compare import assert_as_good


def _attention(**options: bool) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(32, 4, batch_first=True, **options)


class Block(nn.Module):
    """Self-attention of which ``wanted`` results are used."""

    def __init__(self, wanted: slice) -> None:
        super().__init__()
        self.attention, self.wanted = _attention(), wanted

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return list(self.attention(hidden, hidden, hidden, need_weights=True)[self.wanted])


def _compiled(module: nn.Module, hidden: Tensor) -> tuple[Report, list[Tensor]]:
    reports: list[Report] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        fused = fuse_graph(graph, inputs, profit=False)
        reports.append(fused.meta["attnfuse_report"])
        return fused

    torch.compiler.reset()
    found = torch.compile(module, backend=backend, fullgraph=True)(hidden)
    return sum(reports, Report()), found


def test_unused_weights_are_no_obstacle() -> None:
    module, hidden = Block(slice(1)).train(), torch.randn(2, 9, 32)
    report, (out,) = _compiled(module, hidden)
    assert len(report.fused) == 1, report
    exact = copy.deepcopy(module).double()(hidden.double())[0]
    assert_as_good(out, module(hidden)[0], exact)


def test_gradients_reach_the_parameters() -> None:
    module, hidden = Block(slice(1)).train(), torch.randn(2, 9, 32)
    source, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    _, (out,) = _compiled(module, hidden)
    for result in (out, source(hidden)[0], exact(hidden.double())[0]):
        result.square().sum().backward()
    for ours, theirs, truth in zip(module.parameters(), source.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert truth.grad is not None
        assert_as_good(ours.grad, theirs.grad, truth.grad, factor=4.0)


def test_returned_weights_are_given() -> None:
    module, hidden = Block(slice(2)).train(), torch.randn(2, 9, 32)
    report, found = _compiled(module, hidden)
    (site,) = report.fused
    assert "weights returned" in site.what
    for ours, theirs in zip(found, module(hidden), strict=True):
        torch.testing.assert_close(ours, theirs)


class Checkpointed(nn.Module):
    """Attention inside a checkpointed region, and attention of its own around it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inner = checkpoint(_attend, query, key, value, use_reentrant=False)
        return _attend(inner, key, value)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * 0.3, dim=-1) @ value


def test_a_checkpointed_region_hides_neither_itself_nor_its_surroundings() -> None:
    args = tuple(torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    report = explain(Checkpointed(), *args, options={"profit": False})
    assert len(report.fused) == 2, report
    assert not report.refused


def test_explaining_leaves_the_graph_that_runs() -> None:
    """The one that Dynamo then runs, with the body of the checkpointed region."""
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    args = tuple(torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    torch.compile(Checkpointed(), backend=backend)(*args)
    (graph,) = graphs
    before = render(graph)
    assert len(fuse_graph(copied(graph), profit=False).meta["attnfuse_report"].fused) == 2
    assert render(graph) == before
