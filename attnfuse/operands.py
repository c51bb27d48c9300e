"""What attention is computed of: the tensors and sizes of one call, as every kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Operands"]


@dataclass(frozen=True)
class Operands:
    """The operands of one call, any strides; letters as in :mod:`attnfuse.spec`.

    ::

        query [*B, H, M, D]   key [*B, Hkv, N, D]   value [*B, Hkv, N, Dv]

    ``captures`` are what the spec's programs read, each ``[*B, H, M, N]`` with size 1 along every axis that the spec
    does not name for it; where the spec drops out there is one more, the last: the seed, an int64 tensor of one
    element. ``symbols`` are the values of the spec's symbolic sizes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    captures: tuple[Tensor, ...] = ()
    symbols: tuple[int, ...] = ()

    @staticmethod
    def of_weights(
        query: Tensor, key: Tensor, captures: tuple[Tensor, ...] = (), symbols: tuple[int, ...] = ()
    ) -> Operands:
        """Those of weights that are the result: a value without columns, which nobody reads."""
        return Operands(query, key, key[..., :0], captures, symbols)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that may ask for a gradient, in the order in which gradients are given."""
        return (*self.qkv, *self.captures)

    @property
    def scoreless(self) -> bool:
        """Whether a size of query or key is zero."""
        return 0 in (*self.query.shape, *self.key.shape)

    @property
    def empty(self) -> bool:
        """Whether a size of query, key or value is zero."""
        return self.scoreless or 0 in self.value.shape
