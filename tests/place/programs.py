"""Small programs, each with a value that comes from somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CASES", "Case"]

B, H, N, D = 2, 4, 6, 8
WIDTH = H * D


def heads(x: Tensor, count: int = H) -> Tensor:
    return x.view(B, -1, count, D).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def from_a_linear(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return attend(q, k, heads(F.linear(x, w)))


def through_a_bias(q: Tensor, k: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, heads(F.linear(x, w) + bias))


def with_a_fused_bias(q: Tensor, k: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, heads(F.linear(x, w, bias)))


def through_a_cast(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return attend(q, k, heads(F.linear(x, w)).to(torch.float32).to(q.dtype))


def through_quantisation(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The fused node reads the float8 tensor."""
    v8 = (heads(F.linear(x, w)) / 2).to(torch.float8_e4m3fn)
    return attend(q, k, v8.to(q.dtype) * 2)


def through_repeated_heads(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    k, v = (part[:, :, None].expand(B, H // 2, 2, -1, D).reshape(B, H, -1, D) for part in (k, heads(F.linear(x, w), 2)))
    return attend(q, k, v)


def through_a_cache(q: Tensor, k: Tensor, x: Tensor, w: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """The cache is returned as it was: new values are appended to it."""
    v = torch.cat([cache, heads(F.linear(x, w))], dim=2)
    return attend(q, k, v), v


def through_a_cache_that_stays_inside(q: Tensor, k: Tensor, x: Tensor, w: Tensor, past: Tensor) -> Tensor:
    return attend(q, k, torch.cat([heads(F.linear(past, w)), heads(F.linear(x, w))], dim=2))


def used_twice(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    v = heads(F.linear(x, w))
    return attend(q, k, v) + attend(k, q, v)


def used_by_others(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Who gets the value returned may rely on its strides."""
    v = heads(F.linear(x, w))
    return attend(q, k, v), v


def graph_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def elementwise_chain(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return attend(q, k, heads(torch.sigmoid(x) * x + 1))


def copied_for_nothing(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return attend(q, k, heads(F.linear(x, w)).contiguous())


def one_product_for_all(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer that makes query, key and value: to turn it turns all three."""
    q, k, v = F.linear(x, w).chunk(3, dim=-1)
    return attend(heads(q), heads(k), heads(v))


def heads_in_one_dimension(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (part.reshape(B * H, -1, D) for part in (q, k, heads(F.linear(x, w))))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


def merged_heads_that_are_scaled(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The view merges what one product for the whole batch would lay apart."""
    q, k, v = (part.reshape(B * H, -1, D) * 2 for part in (q, k, heads(F.linear(x, w))))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


def rows_in_one_dimension(q: Tensor, k: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """As in GPT-2."""
    return attend(q, k, heads(torch.addmm(bias, x.view(B * N, WIDTH), w).view(B, N, WIDTH)))


def convolution(q: Tensor, k: Tensor, image: Tensor, w: Tensor) -> Tensor:
    """One of single points writes its rows contiguously as it stands."""
    return attend(q, k, F.conv1d(image, w).view(B, H, D, N).transpose(2, 3))


@dataclass(frozen=True)
class Case:
    """A program and its arguments; ``copies`` before and after, when a kernel gains much by a transposed value."""

    program: Callable[..., object]
    shapes: tuple[tuple[int, ...], ...]
    copies: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return self.program.__name__

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        # products of small whole numbers are exact, in whatever order they are summed
        return tuple(torch.randint(-4, 5, shape, generator=generator).to(dtype) / 4 for shape in self.shapes)


_Q = ((B, H, N, D), (B, H, N, D))
_X, _W = (B, N, WIDTH), (WIDTH, WIDTH)
CASES = (
    Case(from_a_linear, (*_Q, _X, _W)),
    Case(through_a_bias, (*_Q, _X, _W, (WIDTH,))),
    Case(with_a_fused_bias, (*_Q, _X, _W, (WIDTH,))),
    Case(through_a_cast, (*_Q, _X, _W)),
    Case(through_quantisation, (*_Q, _X, _W)),
    Case(through_repeated_heads, ((B, H, N, D), (B, H // 2, N, D), _X, (WIDTH // 2, WIDTH))),
    Case(through_a_cache, ((B, H, N, D), (B, H, N + 3, D), _X, _W, (B, H, 3, D)), copies=(0, 1)),
    Case(through_a_cache_that_stays_inside, ((B, H, N, D), (B, H, N + 3, D), _X, _W, (B, 3, WIDTH))),
    Case(used_twice, (*_Q, _X, _W)),
    Case(used_by_others, (*_Q, _X, _W), copies=(0, 1)),
    Case(graph_input, (*_Q, (B, H, N, D)), copies=(0, 1)),
    Case(elementwise_chain, (*_Q, _X), copies=(0, 1)),
    Case(copied_for_nothing, (*_Q, _X, _W), copies=(1, 0)),
    Case(one_product_for_all, (_X, (3 * WIDTH, WIDTH))),
    Case(heads_in_one_dimension, (*_Q, _X, _W)),
    Case(merged_heads_that_are_scaled, (*_Q, _X, _W), copies=(1, 0)),
    Case(rows_in_one_dimension, (*_Q, _X, _W, (WIDTH,))),
    Case(convolution, (*_Q, (B, WIDTH, N), (WIDTH, WIDTH, 1))),
)
