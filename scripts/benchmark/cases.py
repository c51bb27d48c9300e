"""The rows of the table: variants, sizes, dtypes, and the tensors they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from benchmark import programs
from benchmark.byhand import Tensors

__all__ = ["DTYPES", "QUICK_LENGTH", "VARIANTS", "Case", "Variant", "cases"]

#: For a smoke test; every variant takes it.
QUICK_LENGTH = 64

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One program and the widths a model gives it; ``extra`` are the shapes of its further tensors.

    The first axis of an extra tensor is the head; ``N`` stands for the case's length.
    """

    name: str
    program: Callable[..., Tensor]
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    lengths: tuple[int, ...] = (512, 2048, 4096)
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: int | None = None
    #: Query, key and value are float8, which is measured on GPUs alone and has no gradient.
    float8: bool = False


VARIANTS: tuple[Variant, ...] = (
    Variant("plain", programs.plain),
    Variant("llama", programs.grouped, kv_heads=2),
    Variant("softcap", programs.softcap, kv_heads=2),
    Variant("alibi", programs.alibi, extra={"slopes": ()}),
    Variant("bias", programs.bias, extra={"table": ("N", "N")}),
    Variant("window", programs.window, kv_heads=2),
    Variant("sinks", programs.sinks, kv_heads=2, extra={"sink": ()}),
    Variant("decode", programs.decode, heads=32, kv_heads=8, width=128, lengths=(4096, 32768), rows=1),
    Variant("float8", programs.float8, extra={"query_scale": (), "key_scale": (), "value_scale": ()}, float8=True),
)


@dataclass(frozen=True)
class Case:
    """One row: a variant (by name, so that it travels to another process) at a length in a dtype, batch 1."""

    name: str
    length: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} N={self.length} {self.dtype}"

    @property
    def variant(self) -> Variant:
        return next(variant for variant in VARIANTS if variant.name == self.name)

    def inputs(self) -> Tensors:
        """Random tensors by the names of the program's parameters."""
        torch.manual_seed(0)
        variant = self.variant
        rows = variant.rows or self.length
        shapes = {
            "query": (1, variant.heads, rows, variant.width),
            "key": (1, variant.kv_heads, self.length, variant.width),
            "value": (1, variant.kv_heads, self.length, variant.width),
            **{name: (variant.heads, *(self.length for _ in axes)) for name, axes in variant.extra.items()},
        }
        made = {name: torch.randn(shape) for name, shape in shapes.items()}
        if "slopes" in made:
            # as the ALiBi paper has them: 2^-1 ... 2^-H
            made["slopes"] = 2.0 ** -torch.arange(1.0, variant.heads + 1)
        return {name: tensor.to(DTYPES[self.dtype]) for name, tensor in made.items()}

    def groups(self, given: Tensors) -> Iterator[Tensors]:
        """The inputs in one part for each key/value head: all that attention does is within one."""
        parts = self.variant.kv_heads
        axis = {name: 1 if name in ("query", "key", "value") else 0 for name in given}
        split = {name: tensor.chunk(parts, axis[name]) for name, tensor in given.items()}
        for part in range(parts):
            yield {name: pieces[part] for name, pieces in split.items()}


def cases(names: tuple[str, ...], lengths: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Case]:
    """The rows that are asked for; an empty tuple asks for all there are."""
    return [
        Case(variant.name, length, dtype)
        for variant in VARIANTS
        if not variant.float8 and (not names or variant.name in names)
        for length, dtype in product(lengths or variant.lengths, DTYPES)
        if not dtypes or dtype in dtypes
    ]
