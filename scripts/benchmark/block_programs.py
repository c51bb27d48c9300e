"""Whole attention blocks, projections and attention, whose values come from different places; in bfloat16 and float8.

In float8 query, key, value and weights are quantised, with one scale a head that was found beforehand; values are
dequantised behind the product. Torch multiplies no float8, so the programs multiply what they make of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCKS", "Block", "Kit", "Sizes"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Sizes:
    """Batch, heads, rows and keys, head size."""

    batch: int = 8
    heads: int = 16
    length: int = 8192
    width: int = 128

    @property
    def model(self) -> int:
        return self.heads * self.width

    @property
    def flops(self) -> float:
        """Of one attention."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.width


Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kit:
    """What blocks are made of; ``narrow`` says that they quantise."""

    sizes: Sizes
    narrow: bool

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.sizes.width).transpose(1, 2)

    def quantised(self, x: Tensor, w: Weights) -> Tensor:
        if not self.narrow or x.dtype == FLOAT8:
            return x
        return (x * w["inverse"]).clamp(-LARGEST, LARGEST).to(FLOAT8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, w: Weights) -> Tensor:
        """Of operands that are quantised where the block quantises."""
        if not self.narrow:
            return torch.softmax(q @ k.transpose(-1, -2) * self.sizes.width**-0.5, dim=-1) @ v
        query, key = (x.to(torch.bfloat16) * w["scale"] for x in (q, k))
        scores = (query @ key.transpose(-1, -2)).float() * self.sizes.width**-0.5
        weights = (torch.softmax(scores, dim=-1) * LARGEST).clamp(max=LARGEST).to(FLOAT8)
        return (weights.to(torch.bfloat16) @ v.to(torch.bfloat16)) * (w["scale"] / LARGEST)

    def out(self, x: Tensor, w: Weights) -> Tensor:
        return F.linear(x.transpose(1, 2).reshape(x.shape[0], -1, self.sizes.model), w["out"])

    def all_of(self, x: Tensor, w: Weights, value: Tensor) -> Tensor:
        """The block of a query and key that linear layers make, and of any value."""
        query, key = (self.quantised(self.heads(F.linear(x, w[name])), w) for name in ("query", "key"))
        return self.out(self.attend(query, key, self.quantised(value, w), w), w)


Program = Callable[[Kit, Tensor, Weights], "Tensor | tuple[Tensor, Tensor]"]


def from_a_linear(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    return kit.all_of(x, w, kit.heads(F.linear(x, w["value"])))


def with_a_bias(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    return kit.all_of(x, w, kit.heads(F.linear(x, w["value"], w["bias"])))


def graph_input(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    return kit.all_of(x, w, w["given"])


def returned_too(kit: Kit, x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Whoever gets the value may rely on how it lies."""
    value = kit.heads(F.linear(x, w["value"]))
    return kit.all_of(x, w, value), value


def used_twice(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    """By two attentions."""
    value = kit.quantised(kit.heads(F.linear(x, w["value"])), w)
    query, key = (kit.quantised(kit.heads(F.linear(x, w[name])), w) for name in ("query", "key"))
    return kit.out(kit.attend(query, key, value, w) + kit.attend(key, query, value, w), w)


def one_product_for_all(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    """To turn it turns query and key as well."""
    query, key, value = (kit.quantised(kit.heads(part), w) for part in F.linear(x, w["all"]).chunk(3, dim=-1))
    return kit.out(kit.attend(query, key, value, w), w)


def from_a_cache(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    """Half of the values are a graph input, the others come from a linear layer."""
    fresh = kit.heads(F.linear(x[:, : kit.sizes.length // 2], w["value"]))
    return kit.all_of(x, w, torch.cat([w["cache"], fresh], dim=2))


def elementwise(kit: Kit, x: Tensor, w: Weights) -> Tensor:
    """What makes the value moves nothing and multiplies no matrices."""
    return kit.all_of(x, w, kit.heads(torch.sigmoid(x) * x))


@dataclass(frozen=True)
class Block:
    """A program, and the names of the tensors it reads beside its input."""

    program: Program
    reads: tuple[str, ...] = ("value",)

    @property
    def name(self) -> str:
        return self.program.__name__

    def inputs(self, sizes: Sizes, *, narrow: bool) -> tuple[Tensor, Weights]:
        """Random: projections that keep the size of what they are given."""
        torch.manual_seed(0)
        batch, heads, length, width, model = sizes.batch, sizes.heads, sizes.length, sizes.width, sizes.model

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)

        matrix = dict.fromkeys(("query", "key", "value", "out"), (model, model)) | {"all": (3 * model, model)}
        wanted = [*(("query", "key") if "all" not in self.reads else ()), "out", *self.reads]
        found: Weights = {name: drawn(*matrix[name], scale=model**-0.5) for name in wanted if name in matrix}
        if "bias" in wanted:
            found["bias"] = drawn(model)
        if "cache" in wanted:
            found["cache"] = drawn(batch, heads, length // 2, width)
        if "given" in wanted:
            # as another block's projection leaves it
            given = drawn(batch, length, heads, width).transpose(1, 2)
            found["given"] = (given * 64).to(FLOAT8) if narrow else given
        if narrow:
            found["scale"] = torch.full((1, heads, 1, 1), 1 / 64, device="cuda", dtype=torch.bfloat16)
            found["inverse"] = 1 / found["scale"]
        return drawn(batch, length, model), found


BLOCKS = (
    Block(from_a_linear),
    Block(with_a_bias, ("value", "bias")),
    Block(graph_input, ("given",)),
    Block(returned_too),
    Block(used_twice),
    Block(one_product_for_all, ("all",)),
    Block(from_a_cache, ("value", "cache")),
    Block(elementwise, ()),
)
