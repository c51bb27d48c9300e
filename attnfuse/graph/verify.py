"""What every graph must be before and after a stage that edits it."""

from __future__ import annotations

from torch.fx import GraphModule

from attnfuse.errors import AttnfuseError
from attnfuse.graph import facts

__all__ = ["verify"]


def verify(module: GraphModule, stage: str) -> None:
    """Raises :class:`AttnfuseError`, naming the stage, when the graph is ill-formed or a fused node has no value."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise AttnfuseError(f"the graph is ill-formed after {stage}: {error}") from error
    for node in module.graph.nodes:
        if facts.op_name(node) == "attention" and facts.value(node) is None:
            raise AttnfuseError(f"{node.name} has no value after {stage}")
