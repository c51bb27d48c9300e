"""An exported program with its attention fused, everything else about it kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree  # torch offers no public one

from attnfuse.fuse import fuse_graph
from attnfuse.graph.order import Order, storage
from attnfuse.graph.state import State
from attnfuse.report import Report
from attnfuse.target import Target

__all__ = ["rewrite"]


def rewrite(
    program: ExportedProgram, *, target: Target | str | None = None, custom_op: bool = False, **options: Any
) -> tuple[ExportedProgram, Report]:
    """``program`` with its attention fused, and what was done. The program given is left as it is.

    Training IR and core ATen IR are both taken and kept; so are state, signature, buffers, guards and
    dynamic ranges. Weights are shared, not copied. Unless ``custom_op``, the result is made of ATen
    operators alone and loads without attnfuse. ``options`` are the fields of
    :class:`attnfuse.options.Options`; a fusion is compared with the program as it runs when loaded, uncompiled,
    unless ``compiled=True``. Raises :class:`BadInput` for an unknown option, target or kernel.
    """
    result = _copied(program)
    settings = {"compiled": False, **options}
    graph = fuse_graph(result.graph_module, target=target, portable=not custom_op, state=_state(program), **settings)
    report: Report = graph.meta.pop("attnfuse_report")
    _rename_outputs(result)
    result.validate()
    return result, report


def _state(program: ExportedProgram) -> State:
    """Which placeholders are parameters, and which are tensors that nobody writes into.

    A persistent buffer is not counted among those, though it may look like a mask: another checkpoint may be loaded.
    """
    signature = program.graph_signature
    # core ATen lists what it writes in its signature, training IR writes
    written = set(signature.buffers_to_mutate.values())
    changed = {storage(write.target).name for write in Order.of(program.graph).writes}
    loaded = set(program.state_dict)
    named = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    constants = {
        name: program.constants[target]
        for name, target in named.items()
        if name not in changed
        and target not in written | loaded
        and isinstance(program.constants.get(target), torch.Tensor)
    }
    return State(parameters=frozenset(signature.inputs_to_parameters), constants=constants)


def _copied(program: ExportedProgram) -> ExportedProgram:
    """A copy whose graph can be edited, with the program's own tensors and call signatures."""
    tensors = pytree.tree_leaves((program.state_dict, program.constants, program.example_inputs))
    shared = [*tensors, program.module_call_graph]
    return copy.deepcopy(program, {id(part): part for part in shared})


def _rename_outputs(program: ExportedProgram) -> None:
    """The signature names outputs by node, and a fused node has another name than what it replaced."""
    returned: Any = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(spec.arg, TensorArgument):
            spec.arg.name = node.name
