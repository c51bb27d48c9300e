"""Programs small enough to export in every test."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cached(nn.Module):
    """Causal grouped-query attention written by hand, which counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16 + 8 + 8)
        self.out = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("shift", torch.full((1,), 0.5), persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        batch, tokens, _ = hidden.shape
        query, key, value = self.project(hidden + self.shift).split((16, 8, 8), dim=-1)
        query = query.view(batch, tokens, 4, 4).transpose(1, 2)
        key, value = (part.view(batch, tokens, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for part in (key, value))
        keep = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()
        scores = (query @ key.transpose(-1, -2) / 2.0).masked_fill(~keep, torch.finfo(hidden.dtype).min)
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, 16)), self.calls.clone()


class Bare(nn.Module):
    """Attention and nothing else: its output is the program's."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(-1, -2) * 0.25, dim=-1) @ value


class Plain(nn.Module):
    """No attention at all."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


class Dropped(nn.Module):
    """Draws random numbers."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.5, training=True)
