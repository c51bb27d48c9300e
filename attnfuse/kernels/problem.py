"""What is asked of a kernel: a spec, the shapes and dtypes of its operands, and how exact it must be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from attnfuse.axes import Minor
from attnfuse.features import describe
from attnfuse.form import form_of
from attnfuse.reference import is_float8, out_dtype
from attnfuse.score import Apply, P, walk
from attnfuse.spec import AttentionSpec

__all__ = ["Numerics", "Operand", "Problem", "Source"]

#: ``faithful`` keeps NaN, infinities and fully masked rows as the source has them; ``fast`` may
#: treat fully masked rows as zero and finite fills as -inf.
Numerics = Literal["faithful", "fast"]

#: How the graph computes the attention as it is: written out, by one call of scaled_dot_product_attention (without a
#: mask, with is_causal, with a mask as a tensor), or by one of flex_attention.
Source = Literal["written", "sdpa", "sdpa causal", "sdpa masked", "flex"]


@dataclass(frozen=True)
class Operand:
    """Shape (symbolic sizes replaced by their hints), dtype and whether a gradient may be asked for.

    ``minor`` says which of the last two dimensions is contiguous in memory: ``"d"``, the last, as in
    ``[*B, H, N, D]``, or ``"n"``, the one before it, as in a transposed view of ``[*B, H, D, N]``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    minor: Minor = "d"

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def without_columns(self) -> Operand:
        """The value that there is not where the weights of this key are wanted."""
        return Operand((*self.shape[:-1], 0), self.dtype)


@dataclass(frozen=True)
class Problem:
    """One attention to be computed. Shapes as in :mod:`attnfuse.spec`; captures in slot order.

    ``symbols`` are hints of the spec's symbolic sizes, for estimates only (empty when unknown);
    ``compiled`` says that the graph around the attention will be compiled, and so would the unfused one.
    ``autocast`` says that autocast is on, or switched on somewhere in the graph.
    ``dynamic`` says that sizes may differ from the hints at run time; ``rows_kept`` that every query
    row is *proven* to keep at least one key, so that fully masked rows cannot occur. ``source`` says what a kernel
    competes with. ``weights`` says that the weights are what is wanted: value then has no columns.
    """

    spec: AttentionSpec
    query: Operand
    key: Operand
    value: Operand
    captures: tuple[Operand, ...] = ()
    symbols: tuple[int, ...] = ()
    compiled: bool = True
    autocast: bool = False
    dynamic: bool = False
    rows_kept: bool = False
    numerics: Numerics = "faithful"
    source: Source = "written"
    weights: bool = False

    @property
    def words(self) -> str:
        """Its features in words."""
        if not self.weights:
            return describe(self.spec)
        # a type that the spec names is that of the weights, and not of what float8 values give
        return f"{describe(replace(self.spec, out_dtype=None))}, weights returned"

    @property
    def shapes(self) -> str:
        """The shapes of its operands, in words."""
        operands = {"q": self.query, "k": self.key} | ({} if self.weights else {"v": self.value})
        return " ".join(f"{name}{list(operand.shape)}" for name, operand in operands.items())

    @property
    def training(self) -> bool:
        """Whether any operand needs a gradient."""
        return any(o.requires_grad for o in (self.query, self.key, self.value, *self.captures))

    @property
    def dtype(self) -> torch.dtype:
        """What a program writes its products in that is written out: query's type; out's where that is a float8."""
        return out_dtype(self.spec, self.value.dtype) if is_float8(self.query.dtype) else self.query.dtype

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of query, key and value."""
        return self.query.dtype, self.key.dtype, self.value.dtype

    @property
    def widened(self) -> Problem:
        """The problem of the written-out program, which multiplies no float8."""
        if not any(map(is_float8, self.dtypes)):
            return self
        return replace(self, **{name: replace(getattr(self, name), dtype=self.dtype) for name in self.minors})

    @property
    def minors(self) -> dict[str, Minor]:
        """How query, key and, where there is one, value lie, by name."""
        lying: dict[str, Minor] = {"query": self.query.minor, "key": self.key.minor}
        return lying if self.weights else {**lying, "value": self.value.minor}

    @property
    def rows(self) -> int:
        """M, query rows of one head."""
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        """N, keys of one head."""
        return self.key.shape[-2]

    @property
    def heads(self) -> int:
        """Batches times query heads."""
        return math.prod(self.query.shape[:-2])

    @property
    def scores(self) -> int:
        """How many scores there are."""
        return self.heads * self.rows * self.keys

    @property
    def plain(self) -> bool:
        """Whether it is a softmax of scaled scores and nothing else."""
        form, spec = form_of(self.spec.score), self.spec
        bare = form is not None and form.softcap is None and not form.bias and not form.keep
        whole = spec.weight == P and spec.weight_dtype is None and not spec.dropout
        return bare and whole and spec.normaliser == "softmax" and spec.sink is None

    @property
    def captured_bytes(self) -> int:
        """Bytes of the captures that vary along rows and keys: those that are read score by score."""
        return sum(
            x.bytes
            for x, captured in zip(self.captures, self.spec.captures, strict=False)
            if {"m", "n"} <= set(captured.axes)
        )

    def count(self, op: str) -> int:
        """How often the score program does an operation."""
        return sum(isinstance(part, Apply) and part.op == op for part in walk(self.spec.score))

    @property
    def flops(self) -> int:
        """Multiply-adds of both products counted as two each, nothing skipped."""
        return 2 * self.scores * (self.query.shape[-1] + self.value.shape[-1])
