"""The three kinds of graph that attnfuse is given, each rewritten and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from attnfuse import fuse_graph, rewrite
from attnfuse.report import Report

__all__ = ["DOORS", "Rewritten", "as_module", "rewritten"]


def as_module(function: Callable[..., Any]) -> nn.Module:
    """A module whose forward is ``function``, with its argument names and source lines."""
    made: nn.Module = type(function.__name__, (nn.Module,), {"forward": staticmethod(function)})()
    return made


@dataclass(frozen=True)
class Rewritten:
    """A rewritten program and what was done to it."""

    run: Callable[..., Tensor]
    report: Report


def _dynamo(module: nn.Module, args: tuple[Tensor, ...], dynamic: bool, **options: Any) -> Rewritten:
    found: list[Report] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fused = fuse_graph(graph, inputs, **options)
        found.append(fused.meta["attnfuse_report"])
        return fused.forward

    torch.compiler.reset()
    run = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    run(*args)
    return Rewritten(run, sum(found[1:], found[0]) if found else Report())


def _training_ir(module: nn.Module, args: tuple[Tensor, ...], dynamic: bool, **options: Any) -> Rewritten:
    program, report = rewrite(_exported(module, args, dynamic), custom_op=True, **options)
    return Rewritten(program.module(), report)


def _core_aten(module: nn.Module, args: tuple[Tensor, ...], dynamic: bool, **options: Any) -> Rewritten:
    exported = _exported(module, args, dynamic).run_decompositions()
    program, report = rewrite(exported, custom_op=True, **options)
    return Rewritten(program.module(), report)


def _exported(module: nn.Module, args: tuple[Tensor, ...], dynamic: bool) -> ExportedProgram:
    auto = tuple(dict.fromkeys(range(arg.dim()), Dim.AUTO) for arg in args)
    return torch.export.export(module, args, dynamic_shapes=auto if dynamic else None)


#: ``torch.compile``'s graph, an exported program, and one that is decomposed to core ATen.
DOORS: dict[str, Callable[..., Rewritten]] = {
    "dynamo": _dynamo,
    "training IR": _training_ir,
    "core ATen": _core_aten,
}


def rewritten(
    door: str, module: nn.Module, args: tuple[Tensor, ...], dynamic: bool = False, **options: Any
) -> Rewritten:
    """``module`` rewritten through one of :data:`DOORS`, fusing even where it does not pay.

    ``dynamic`` makes every size symbolic that can be.
    """
    return DOORS[door](module, args, dynamic, profit=False, **options)
