"""attnfuse as a peer for tools that count the attention in models: ``--peer attnfuse=peer:fuse``, scripts on the path.

Models for such counts are tiny, and no kernel pays on them: what is counted here is what can be fused, not what pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from attnfuse import fuse_graph


class Peer:
    """Fuses whatever can be fused."""

    def setup(self) -> None:
        """What is loaded at the first attention of a process, once, before such tools fork one for each model."""
        example = [torch.randn(1, 1, 4, 8) for _ in range(3)]
        self(make_fx(_attention, tracing_mode="fake", pre_dispatch=True)(*example), example)

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        return fuse_graph(graph, inputs, profit=False)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


fuse = Peer()
