"""What a causal mask costs a model, and what is left of it once attention is fused: nodes, and peak memory of a call.

python scripts/masks.py -n 4096

Each figure is a Llama's Dynamo graph run node by node: as it was captured, and with its attention fused. A mask is a
value of at least rows x keys; it is built once for all layers and stays in memory until the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaModel

from attnfuse import fuse_graph
from attnfuse.graph import facts
from attnfuse.graph.copies import copied
from benchmark.measure import peak_bytes

HEADS, WIDTH = 4, 64


@dataclass(frozen=True)
class Figure:
    """One graph: its nodes, those of rows x keys and more, the bytes a call adds at its highest, and its result."""

    nodes: int
    large: int
    peak: int | None
    result: Tensor


def figure(graph: GraphModule, arguments: list[Any], length: int) -> Figure:
    """``graph`` as it runs on ``arguments``; ``length`` is rows and keys."""
    large = [n for n in graph.graph.nodes if facts.is_tensor(n) and sum(s == length for s in facts.hint(n)) > 1]
    results: list[Tensor] = []
    with torch.no_grad():
        peak = peak_bytes(lambda: results.append(graph(*arguments)[0]))
    return Figure(len(graph.graph.nodes), len(large), peak, results[0])


def compare(length: int, layers: int, implementation: str, *, padded: bool) -> tuple[Figure, Figure, str]:
    """The captured graph, the fused one, and the report."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": HEADS * WIDTH,
        "intermediate_size": 2 * HEADS * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "max_position_embeddings": length,
        "use_cache": False,
        "attn_implementation": implementation,
    }
    model: nn.Module = LlamaModel(LlamaConfig(**settings))
    inputs = {"input_ids": torch.randint(128, (1, length))}
    if padded:
        inputs["attention_mask"] = (torch.arange(length) >= length // 8).long()[None]
    found: list[tuple[Figure, Figure, str]] = []

    def backend(graph: GraphModule, example: list[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            fused = fuse_graph(copied(graph), example)
            # the second first: what the first leaves to the allocator must not be counted as its own
            after = figure(fused, list(arguments), length)
            before = figure(graph, list(arguments), length)
            found.append((before, after, str(fused.meta["attnfuse_report"])))
            return (before.result,)

        return run

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(**inputs)
    return found[0]


def masks(
    length: Annotated[int, typer.Option("--length", "-n", help="rows and keys")] = 4096,
    layers: Annotated[int, typer.Option(help="of the model")] = 2,
) -> None:
    out = Console(width=None if Console().is_terminal else 150)
    table = Table("Llama", "", "nodes", "of N x N", "peak, MB", title=f"N = {length}, {layers} layers, float32")
    for implementation in ("eager", "sdpa"):
        for padded in (False, True):
            before, after, report = compare(length, layers, implementation, padded=padded)
            # float32 scores rounded in another order, through all layers
            torch.testing.assert_close(after.result, before.result, rtol=1e-3, atol=1e-3)
            for name, got in (("as captured", before), ("fused", after)):
                what = f"{implementation}, {'left padding' if padded else 'no padding'}"
                peak = "" if got.peak is None else f"{got.peak / 2**20:.0f}"
                table.add_row(what, name, str(got.nodes), str(got.large), peak)
            out.print(report, highlight=False)
    out.print(table)


if __name__ == "__main__":
    typer.run(masks)
