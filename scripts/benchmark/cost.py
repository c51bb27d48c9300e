"""What rewriting costs: seconds of ``fuse_graph`` against nodes, and Inductor on the same graphs."""

from __future__ import annotations

import copy
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

import attnfuse
from benchmark.targets import Target

__all__ = ["Cost", "as_table", "measure_cost", "targets"]


@dataclass(frozen=True)
class Cost:
    """One graph and the seconds that each took for it; ``compiling`` is None where Inductor was not asked."""

    layers: int
    nodes: int
    sites: int
    rewriting: float
    compiling: float | None


def measure_cost(layers: int, *, with_inductor: bool) -> Cost:
    """Of a tiny Llama with so many layers, as Dynamo captures it. Needs a fresh process, and transformers."""
    _measured(1, with_inductor=with_inductor)  # what is loaded and built on first use is no part of a graph's cost
    return _measured(layers, with_inductor=with_inductor)


def _measured(layers: int, *, with_inductor: bool) -> Cost:
    found: list[Cost] = []

    def both(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes = len(graph.graph.nodes)
        compiling = _compiling_seconds(copy.deepcopy(graph), inputs) if with_inductor else None
        started = _now()
        fused = attnfuse.fuse_graph(graph, inputs)
        rewriting = time.perf_counter() - started
        found.append(Cost(layers, nodes, len(fused.meta["attnfuse_report"].sites), rewriting, compiling))
        return graph.forward

    torch.compiler.reset()
    _run_llama(layers, both)
    return found[0]


def _compiling_seconds(graph: GraphModule, inputs: Sequence[Any]) -> float:
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        started = _now()
        lookup_backend("inductor")(graph, list(inputs))
        return time.perf_counter() - started


def _now() -> float:
    """The clock, with no garbage of what ran before left to be collected at the expense of what runs next."""
    gc.collect()
    return time.perf_counter()


def _run_llama(layers: int, backend: Callable[..., Any]) -> None:
    # only --cost needs it, and it is not among the runtime's dependencies
    from transformers import LlamaConfig, LlamaModel  # noqa: PLC0415

    widths: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    options: dict[str, Any] = {"num_key_value_heads": 2, "attn_implementation": "eager", "use_cache": False}
    model: nn.Module = LlamaModel(LlamaConfig(num_hidden_layers=layers, **widths, **options))
    model.eval()
    ids = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(input_ids=ids, attention_mask=torch.ones_like(ids))


def as_table(costs: Sequence[Cost]) -> Table:
    """One line a graph."""
    table = Table(title="seconds to rewrite a Llama graph, and Inductor's to compile it")
    for heading in ("layers", "nodes", "sites", "attnfuse s", "us / node", "Inductor s", "attnfuse / Inductor"):
        table.add_column(heading, justify="right")
    for cost in costs:
        per_node = f"{cost.rewriting / cost.nodes * 1e6:.0f}"
        figures = (str(cost.layers), str(cost.nodes), str(cost.sites), f"{cost.rewriting:.2f}", per_node)
        beside = (
            ("-", "-")
            if cost.compiling is None
            else (f"{cost.compiling:.1f}", f"{cost.rewriting / cost.compiling:.3f}")
        )
        table.add_row(*figures, *beside)
    return table


def targets(costs: Sequence[Cost]) -> list[Target]:
    """Linear in the graph, and at most a tenth of what Inductor takes."""
    found = []
    if len(costs) > 2:
        nodes, seconds = [float(cost.nodes) for cost in costs], [cost.rewriting for cost in costs]
        line = linear_regression(nodes, seconds)
        # a straight line hides a mild curve; the power does not
        power = linear_regression([math.log(n) for n in nodes], [math.log(s) for s in seconds]).slope
        where = f"line: {line.intercept:.2f} s + {line.slope * 1e6:.0f} us a node"
        found.append(Target("power of nodes that seconds grow with", power, 1.2, where=where))
    if shares := {cost.layers: cost.rewriting / cost.compiling for cost in costs if cost.compiling}:
        worst = max(shares, key=lambda layers: shares[layers])
        found.append(Target("share of Inductor's compile time, largest", shares[worst], 0.1, where=f"{worst} layers"))
    return found
