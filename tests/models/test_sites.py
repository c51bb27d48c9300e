"""The table's counts of attention sites, against an independent count on both kinds of graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests.models.sites import count
from tests.models.zoo import MODELS, ZOO, Model


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)
def test_dynamo_graph(model: Model, model_of: Callable[..., nn.Module]) -> None:
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(model_of(model.name, torch.float32), backend=keep, fullgraph=True)(**model.feed("none"))
    assert [count(graph) for graph in graphs] == [model.sites]


@pytest.mark.parametrize("name", ["t5", "swin", "bloom", "gpt-oss"])
def test_exported_graph(name: str, model_of: Callable[..., nn.Module]) -> None:
    model = MODELS[name]
    program = torch.export.export(model_of(name, torch.float32), (), model.feed(model.paddings[-1]))
    assert count(program.module()) == model.sites
    assert count(program.run_decompositions().module()) == model.sites
