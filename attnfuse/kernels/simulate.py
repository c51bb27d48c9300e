"""Carries out a schedule in plain torch, tile by tile, as a kernel would: what shows that it computes the spec.

One batch and head at a time would be slow, so a tile holds all of them; everything else is as the schedule says:
which tiles there are, in which order they are done, what is kept between them, what is done late or ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnfuse.dropout import kept
from attnfuse.errors import BadProgram
from attnfuse.kernels.rows import Band, masking_band, skips_surely
from attnfuse.kernels.schedule import Schedule
from attnfuse.operands import Operands
from attnfuse.reference import Scope, Span, evaluate, repeat_heads, seed_of
from attnfuse.score import P, text
from attnfuse.spec import AttentionSpec

__all__ = ["Sums", "merged", "simulate", "spans"]


@dataclass(frozen=True)
class Sums:
    """What an online softmax knows of some rows: ``out`` not yet divided by ``total``, relative to ``top``."""

    out: Tensor
    top: Tensor
    total: Tensor

    def shrunk(self, top: Tensor) -> Sums:
        """The same sums relative to a higher maximum."""
        factor = (self.top - _base(top)).exp()
        return Sums(self.out * factor, top, self.total * factor)


def merged(parts: Sequence[Sums]) -> Sums:
    """The sums of spans of keys together: a span that none of a row's keys is in weighs nothing there."""
    top = torch.stack([part.top for part in parts]).amax(dim=0)
    shrunk = [part.shrunk(top) for part in parts]
    out, total = (torch.stack([getattr(part, name) for part in shrunk]).sum(dim=0) for name in ("out", "total"))
    return Sums(out, top, total)


def _base(top: Tensor) -> Tensor:
    """The maximum, where there is one to subtract."""
    return top.masked_fill(top == float("-inf"), 0.0)


def spans(first: int, last: int, size: int) -> list[Span]:
    """``first..last-1`` in tiles that begin at multiples of ``size``."""
    return [(start, min(start + size, last)) for start in range(first // size * size, last, size)]


@dataclass(frozen=True)
class Simulation:
    """One call."""

    spec: AttentionSpec
    operands: Operands
    schedule: Schedule

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.operands.key.shape[-2]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.operands.query.shape[-2]

    def tiles_of_rows(self) -> list[Span]:
        """Tiles of rows in the order in which they start."""
        tiles = spans(0, self.rows, self.schedule.rows)
        return tiles[::-1] if self.schedule.order == "longest first" else tiles

    def tiles_of_keys(self, rows: Span) -> list[Span]:
        """The tiles of keys that a tile of rows visits."""
        return spans(*self._band().reach(*rows, self.keys), self.schedule.keys)

    def _band(self) -> Band:
        sure = skips_surely(self.spec, self.rows, self.keys, self.operands.symbols)
        return masking_band(self.spec, self.operands.symbols) if sure else Band(exact=False)

    # --- one tile -----------------------------------------------------------------------------------

    def scope(self, rows: Span, keys: Span) -> Scope:
        """What programs read on a tile."""
        whole = Scope.whole(self.operands)
        return replace(whole, spans=(*whole.spans[:-2], rows, keys))

    def scores(self, rows: Span, keys: Span) -> Tensor:
        """The first product."""
        scope, query = self.scope(rows, keys), self.operands.query
        key = repeat_heads(self.operands.key[..., slice(*keys), :], query.shape[-3]).to(scope.dtype)
        return query[..., slice(*rows), :].to(scope.dtype) @ key.transpose(-1, -2)

    def weights(self, score: Tensor, before: Sums, rows: Span, keys: Span) -> tuple[Sums, Tensor]:
        """The sums relative to the new maximum, this tile's weights in ``total``; and the weights after dropout."""
        scope = replace(self.scope(rows, keys), score=score)
        logit = evaluate(self.spec.score, scope).to(scope.dtype).expand(score.shape)
        after = before.shrunk(torch.maximum(before.top, logit.amax(dim=-1, keepdim=True)))
        weight = (logit - _base(after.top)).exp()
        after = replace(after, total=after.total + weight.sum(dim=-1, keepdim=True))
        if self.spec.dropout:
            mask = kept(seed_of(self.spec, self.operands.captures), self.spec.dropout, scope.indices())
            weight = weight * mask * (1 / (1 - self.spec.dropout) if self.spec.dropout < 1 else 0.0)
        return after, weight

    def product(self, weight: Tensor, keys: Span) -> Tensor:
        """The second product."""
        query, _, value = self.operands.qkv
        whole = repeat_heads(value[..., slice(*keys), :], query.shape[-3]).to(weight.dtype)
        return weight.to(value.dtype).to(weight.dtype) @ whole

    # --- a walk over keys ---------------------------------------------------------------------------

    def start(self, rows: Span) -> Sums:
        """No key seen yet; a sink is a key of weight one relative to itself, without a value."""
        scope, (query, _, value) = self.scope(rows, (0, 1)), self.operands.qkv
        shape = (*query.shape[:-2], rows[1] - rows[0], 1)
        top = query.new_full(shape, float("-inf"), dtype=scope.dtype)
        if self.spec.sink is not None:
            top = evaluate(self.spec.sink, scope).to(scope.dtype).expand(shape)
        return Sums(top.new_zeros((*shape[:-1], value.shape[-1])), top, (top > float("-inf")).to(top.dtype))

    def walk(self, before: Sums, rows: Span, tiles: Sequence[Span]) -> Sums:
        """The sums after some tiles of keys, in the order of operations that the pipelining says."""
        return _WALKS[self.schedule.pipelining](self, before, rows, tiles)

    def in_turn(self, sums: Sums, rows: Span, tiles: Sequence[Span]) -> Sums:
        """Each tile from its scores to its product."""
        for keys in tiles:
            sums, weight = self.weights(self.scores(rows, keys), sums, rows, keys)
            sums = replace(sums, out=sums.out + self.product(weight, keys))
        return sums

    def query_key_ahead(self, sums: Sums, rows: Span, tiles: Sequence[Span]) -> Sums:
        """The next tile's scores before this tile's softmax."""
        ahead = self.scores(rows, tiles[0]) if tiles else None
        for place, keys in enumerate(tiles):
            score, ahead = ahead, self.scores(rows, tiles[min(place + 1, len(tiles) - 1)])
            assert score is not None
            sums, weight = self.weights(score, sums, rows, keys)
            sums = replace(sums, out=sums.out + self.product(weight, keys))
        return sums

    def weight_value_behind(self, sums: Sums, rows: Span, tiles: Sequence[Span]) -> Sums:
        """The last tile's product after this tile's scores, before the sums are made relative to a new maximum."""
        late: tuple[Tensor, Span] | None = None
        for keys in tiles:
            score = self.scores(rows, keys)
            sums = self.caught_up(sums, late)
            sums, weight = self.weights(score, sums, rows, keys)
            late = weight, keys
        return self.caught_up(sums, late)

    def caught_up(self, sums: Sums, late: tuple[Tensor, Span] | None) -> Sums:
        """The sums with a late product added."""
        return sums if late is None else replace(sums, out=sums.out + self.product(*late))

    # --- algorithms ---------------------------------------------------------------------------------

    def rows_outside(self) -> Iterator[tuple[Span, Sums]]:
        """FlashAttention-2."""
        for rows in self.tiles_of_rows():
            yield rows, self.walk(self.start(rows), rows, self.tiles_of_keys(rows))

    def keys_outside(self) -> Iterator[tuple[Span, Sums]]:
        """FlashAttention-1: the sums of a span's tiles of rows are kept from tile of keys to tile of keys."""
        tiles = self.tiles_of_rows()
        each = -(-len(tiles) // self.schedule.spans)
        for begin in range(0, len(tiles), each):
            kept_sums = {rows: self.start(rows) for rows in tiles[begin : begin + each]}
            for first, _ in spans(0, self.keys, self.schedule.keys):
                for rows, sums in kept_sums.items():
                    tile = [keys for keys in self.tiles_of_keys(rows) if keys[0] == first]
                    kept_sums[rows] = self.walk(sums, rows, tile)
            yield from kept_sums.items()

    def split_keys(self) -> Iterator[tuple[Span, Sums]]:
        """FlashDecoding: each split starts anew, the sink in the first; then they are merged."""
        for rows in self.tiles_of_rows():
            tiles = self.tiles_of_keys(rows)
            each = max(1, -(-len(tiles) // self.schedule.splits))
            first = self.start(rows)
            empty = Sums(first.out, torch.full_like(first.top, float("-inf")), torch.zeros_like(first.total))
            starts = [first, *[empty] * (self.schedule.splits - 1)]
            parts = [tiles[place * each : (place + 1) * each] for place in range(self.schedule.splits)]
            yield rows, merged([self.walk(sums, rows, part) for sums, part in zip(starts, parts, strict=True)])


Walk = Callable[[Simulation, Sums, Span, Sequence[Span]], Sums]
_WALKS: dict[str, Walk] = {
    "none": Simulation.in_turn,
    "query-key ahead": Simulation.query_key_ahead,
    "weight-value behind": Simulation.weight_value_behind,
}
_ALGORITHMS: dict[str, Callable[[Simulation], Iterator[tuple[Span, Sums]]]] = {
    "rows outside": Simulation.rows_outside,
    "keys outside": Simulation.keys_outside,
    "split keys": Simulation.split_keys,
}


def simulate(spec: AttentionSpec, operands: Operands, schedule: Schedule) -> Tensor:
    """``out [*B, H, M, Dv]`` as the schedule computes it; no size is zero.

    Raises :class:`BadProgram` for a weight program, which an online softmax has no weights for.
    """
    if spec.weight != P:
        raise BadProgram(f"an online softmax has no weights for the program {text(spec.weight)!r}")
    simulation, (query, _, value) = Simulation(spec, operands, schedule), operands.qkv
    out = value.new_full((*query.shape[:-1], value.shape[-1]), float("nan"))
    for (first, last), sums in _ALGORITHMS[schedule.algorithm](simulation):
        out[..., first:last, :] = (sums.out / sums.total).to(out.dtype)
    return out
