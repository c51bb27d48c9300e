"""``attnfuse demo``: a small decoder with attention written by hand, exported, fused, verified and timed here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.export import Dim

from attnfuse import pt2
from attnfuse.screen import show_certificate, show_report, show_rows, stage

__all__ = ["Decoder", "run"]

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 256, 2, 8, 2, 32, 512
LENGTH = 2048
_LENGTHS = Dim.AUTO(min=2, max=2 * LENGTH)


class Attention(nn.Module):
    """Grouped-query causal attention as model code spells it: no fused call anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_SIZE, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_SIZE, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_SIZE, bias=False)
        self.out = nn.Linear(HEADS * HEAD_SIZE, WIDTH, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """``hidden`` and the result [batch, tokens, width]; ``mask`` [tokens, tokens], added to the scores."""
        batch, tokens, _ = hidden.shape
        query = self.query(hidden).view(batch, tokens, HEADS, HEAD_SIZE).transpose(1, 2)
        key = self.key(hidden).view(batch, tokens, KV_HEADS, HEAD_SIZE).transpose(1, 2)
        value = self.value(hidden).view(batch, tokens, KV_HEADS, HEAD_SIZE).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)) * HEAD_SIZE**-0.5 + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed: Tensor = self.out(torch.matmul(weights, value).transpose(1, 2).reshape(batch, tokens, -1))
        return mixed


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = Attention()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Shapes as in :class:`Attention`."""
        hidden = hidden + self.attention(self.norms[0](hidden), cos, sin, mask)
        normed = self.norms[1](hidden)
        change: Tensor = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return hidden + change


class Decoder(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Builds the rotary table and the causal mask, as model code does, inside the program."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        frequency = 1e4 ** (-torch.arange(0, HEAD_SIZE, 2, device=tokens.device) / HEAD_SIZE)
        angle = torch.outer(position, frequency).repeat(1, 2)
        hidden = self.embedding(tokens)
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.where(position[:, None] >= position[None, :], 0.0, lowest).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, angle.cos(), angle.sin(), mask)
        logits: Tensor = self.head(hidden)
        return logits


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: ``heads`` [..., tokens, head size], the tables [tokens, head size]."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


def run() -> None:
    """Export, rewrite, verify and time; prints what happened. Raises what the steps raise."""
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH))
    with tempfile.TemporaryDirectory(prefix="attnfuse-demo-") as folder:
        source, result = Path(folder, "decoder.pt2"), Path(folder, "fused.pt2")
        typer.echo(
            f"a decoder of {LAYERS} layers, {HEADS} query and {KV_HEADS} key/value heads, {LENGTH} tokens, float32"
        )
        with stage("exporting"):
            pt2.save(torch.export.export(Decoder().eval(), (tokens,), dynamic_shapes=({1: _LENGTHS},)), source, {})
        with stage("fusing"):
            program = pt2.load(source)
            fused, report = pt2.rewrite(program)
        show_report(report)
        with stage("verifying"):
            certificate = pt2.check(program, fused)
        pt2.save(fused, result, {"attnfuse.json": report.to_json()})
        show_certificate(certificate)
        with stage("timing"):
            before, after = (_seconds(pt2.load(path).module(), tokens) for path in (source, result))
    rows = (
        ("as written", f"{1e3 * before:.0f} ms"),
        ("fused", f"{1e3 * after:.0f} ms"),
        ("gain", f"{before / after:.1f}x"),
    )
    show_rows((f"{torch.get_num_threads()} threads", "one run"), rows)


def _seconds(module: Callable[[Tensor], Tensor], tokens: Tensor, runs: int = 3) -> float:
    """The fastest of a few runs, after one that is not counted."""
    took = []
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.perf_counter()
            module(tokens)
            took.append(time.perf_counter() - start)
    return min(took[1:])
