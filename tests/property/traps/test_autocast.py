"""Attention in the modes of autocast that a program switches on and off itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from attnfuse import fuse_graph
from attnfuse.report import Report
from tests.support.compare import assert_as_good

HALF = {"device_type": "cpu", "dtype": torch.bfloat16}


def inside(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.autocast(**HALF):
        return torch.softmax(query @ key.transpose(-1, -2) * 0.25, dim=-1) @ value


def off_for_the_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.autocast(**HALF):
        scores = query @ key.transpose(-1, -2) * 0.25
        with torch.autocast("cpu", enabled=False):
            weights = torch.softmax(scores.float(), dim=-1)
        return weights @ value


def off_for_the_second_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.autocast(**HALF):
        weights = torch.softmax(query @ key.transpose(-1, -2) * 0.25, dim=-1)
    return weights.float() @ value


def over_before(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.autocast(**HALF):
        value = value + 1
    return torch.softmax(query @ key.transpose(-1, -2) * 0.25, dim=-1) @ (value - 1)


def exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All of them without a cast, in float64."""
    return torch.softmax(query.double() @ key.double().transpose(-1, -2) * 0.25, dim=-1) @ value.double()


@pytest.mark.parametrize("program", [inside, off_for_the_softmax, off_for_the_second_product, over_before])
def test_a_site_is_replayed_in_the_modes_that_it_is_in(program: Callable[..., Tensor]) -> None:
    reports: list[Report] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        reports.append(fuse_graph(graph, inputs, profit=False).meta["attnfuse_report"])
        return graph

    torch.compiler.reset()
    given = [torch.randn(2, 4, 24, 16) for _ in range(3)]
    found = torch.compile(program, backend=backend, fullgraph=True)(*given)
    (site,) = reports[0].fused
    assert site.certificate is not None
    assert site.certificate.inputs, "it was replayed"
    source = program(*given)
    assert found.dtype == source.dtype
    assert_as_good(found, source, exactly(*given))
    assert not torch.is_autocast_enabled("cpu")
