"""``explain``: what would be fused in a model, and why the rest would not, without changing or compiling it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from attnfuse.fuse import fuse_graph
from attnfuse.graph.copies import copied
from attnfuse.options import Options
from attnfuse.report import Report

__all__ = ["explain"]


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """The report of every graph that Dynamo captures while ``model(*args, **kwargs)`` runs once.

    A keyword ``options={...}``, of the fields of :class:`attnfuse.options.Options`, is not passed to the model.
    Raises what the model raises, and :class:`~attnfuse.errors.BadInput` for an unknown option.
    """
    options = kwargs.pop("options", {})
    Options.of(options)
    reports: list[Report] = []

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # the model runs on the graph as it was: explaining must not depend on a rewrite being right
        reports.append(fuse_graph(copied(gm), example_inputs, **options).meta["attnfuse_report"])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=record)(*args, **kwargs)
    return sum(reports[1:], reports[0]) if reports else Report()
