"""An exported program with its attention fused, everything else about it kept."""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree  # torch offers no public one

from attnfuse.fuse import fuse_graph
from attnfuse.graph import facts
from attnfuse.kernels import Numerics
from attnfuse.report import Report
from attnfuse.target import Target

__all__ = ["rewrite"]


def rewrite(
    program: ExportedProgram,
    *,
    target: Target | str | None = None,
    custom_op: bool = False,
    kernel: str | None = None,
    numerics: Numerics = "faithful",
    certify: Literal["full", "quick", "off"] = "quick",
    profit: bool = True,
) -> tuple[ExportedProgram, Report]:
    """``program`` with its attention fused, and what was done. The program given is left as it is.

    Training IR and core ATen IR are both taken and kept; so are state, signature, buffers, guards and
    dynamic ranges. Weights are shared, not copied. Unless ``custom_op``, the result is made of ATen
    operators alone and loads without attnfuse. The other options are those of
    :func:`attnfuse.fuse_graph`. Raises :class:`NoKernel` and :class:`BadInput`.
    """
    result = _copied(program)
    arguments = [facts.value(node) for node in _nodes(result.graph_module, "placeholder")]
    fused = fuse_graph(
        result.graph_module,
        arguments,
        target=target,
        portable=not custom_op,
        kernel=kernel,
        numerics=numerics,
        certify=certify,
        profit=profit,
    )
    report: Report = fused.meta["attnfuse_report"]
    _adopt(result, fused)
    result.validate()  # type: ignore[no-untyped-call]
    return result, report


def _copied(program: ExportedProgram) -> ExportedProgram:
    """A copy whose graph can be edited, with the program's own tensors."""
    held = (program.state_dict, program.constants, program.example_inputs)
    return copy.deepcopy(program, {id(leaf): leaf for leaf in pytree.tree_leaves(held)})


def _nodes(graph: GraphModule, op: str) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == op]


def _adopt(program: ExportedProgram, fused: GraphModule) -> None:
    """Make ``fused`` the program's graph, and its outputs' names the signature's."""
    owner = program.graph_module
    if fused is not owner:
        for name, child in fused.named_children():
            setattr(owner, name, child)
        owner.graph = fused.graph
    owner.meta.pop("attnfuse_report", None)
    owner.recompile()
    (output,) = _nodes(owner, "output")
    returned: Any = output.args[0]
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(spec.arg, TensorArgument):
            spec.arg.name = node.name
