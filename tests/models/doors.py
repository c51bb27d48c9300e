"""What the tests of every door share: cases, options, a spy on the backend, and what "all fused" means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from attnfuse.report import Report
from tests.models.sites import count
from tests.models.zoo import ZOO, Model, Padding

__all__ = ["CASES", "OPTIONS", "Spy", "assert_all_fused", "compiled"]

#: The gate is off because it would be right: at 13 tokens the unfused graph is the faster one, and these
#: tests are about what is found and what it computes.
OPTIONS: dict[str, Any] = {"profit": False}

#: A mask is an input like another, so both paddings run through one graph; no mask is another graph.
GROUPS: tuple[tuple[Padding, ...], ...] = (("none",), ("left", "right"))


def _cases() -> Iterator[Any]:
    for model in ZOO:
        for dtype in (torch.float32, torch.bfloat16):
            for group in GROUPS:
                if set(group) <= set(model.paddings):
                    words = (model.name, str(dtype).removeprefix("torch."), "+".join(group))
                    yield pytest.param(model, dtype, group, id="-".join(words))


#: Model, dtype, and the paddings that share a graph.
CASES = tuple(_cases())


@dataclass
class Spy:
    """Stands between the backend and ``fuse_graph`` and keeps what passes: reports, and sites before and after."""

    reports: list[Report] = field(default_factory=list)
    sites: list[tuple[int, int]] = field(default_factory=list)

    def wrap(self, fuse_graph: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
        """``fuse_graph``, watched."""

        def watched(graph: GraphModule, *args: Any, **options: Any) -> GraphModule:
            before = count(graph)
            fused = fuse_graph(graph, *args, **options)
            self.reports.append(fused.meta["attnfuse_report"])
            self.sites.append((before, count(fused)))
            return fused

        return watched

    def assert_all_fused(self, model: Model) -> None:
        """Raises AssertionError unless the whole model was compiled as one graph with no site left in it.

        Dynamo may start a graph over, so it can have been handed in more than once.
        """
        assert self.reports
        for report in self.reports:
            assert_all_fused(report, model)
        assert set(self.sites) == {(model.sites, 0)}, f"{self.sites} sites before and after"


def assert_all_fused(report: Report, model: Model) -> None:
    """Raises AssertionError, with the report, unless every site and nothing else was found and fused."""
    assert (len(report.fused), len(report.refused)) == (model.sites, 0), str(report)


def compiled(
    module: nn.Module, *, kernel: str | None = "blocked", inner: str = "aot_eager", dynamic: bool | None = None
) -> Callable[..., Any]:
    """The module through the backend's door, in one graph.

    ``kernel`` is the one that takes every program; the cheapest at these sizes would be the written-out
    program itself. Inductor would spend minutes on the operations around the fused nodes: ``inner`` leaves
    it out.
    """
    options = {**OPTIONS, "kernel": kernel, "inner": inner}
    return torch.compile(module, backend="attnfuse", options=options, fullgraph=True, dynamic=dynamic)
