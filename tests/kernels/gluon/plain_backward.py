"""A backward without a GPU: its plan is the real one, its body and its last pass run in plain Python.

Lists of tiles and sums of rows, which launches of Triton make, are made in torch by the same definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.kernels.gluon import backward, backward_plan, finish, gradients
from attnfuse.kernels.gluon.backward_build import _SIZES, BackwardPrograms, BackwardSource, _signature
from attnfuse.kernels.gluon.gradients import HopperGradients
from attnfuse.kernels.triton import Listing
from attnfuse.kernels.triton import gradients as base
from attnfuse.kernels.triton.backward import FAINT
from attnfuse.operands import Operands
from attnfuse.reference import Scope, evaluate, repeat_heads
from attnfuse.target import Target
from tests.kernels.gluon import plain
from tests.kernels.gluon.plain_launch import DRIVER, arguments, function, pointer

__all__ = ["Launched", "in_plain_python"]

NAMES = backward.attention_backward.arg_names


@dataclass
class Launched:
    """How bodies run: after which changes of their text, and which partition is the fastest; and which have run."""

    changes: tuple[tuple[str, str], ...] = ()
    speed: tuple[int, ...] = ()
    sources: tuple[BackwardSource, ...] = ()

    def build(self, source: BackwardSource) -> Any:
        """In place of what compiles a body."""
        self.sources += (source,)
        return _Launcher(lambda grid, given: self._body(source, grid, given))

    def _body(self, source: BackwardSource, grid: int, given: Sequence[Any]) -> None:
        gl = plain.language(grid)
        named = dict(zip(NAMES, given, strict=True))
        found = arguments(named, _signature(source), _SIZES)
        found |= {name: pointer(named[name]) for name in ("strange", "lists") if named[name] is not None}
        found |= {"programs": _programs(source, gl), "meta": source.meta}
        body = plain.spoken(backward, gl, *self.changes)["attention_backward"]
        plain.launch(body, grid, *(found[name] for name in NAMES), speed=self.speed)


@dataclass(frozen=True)
class _Launcher:
    """What is asked for a grid, then called."""

    run: Callable[[int, Sequence[Any]], None]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **_: self.run(grid[0], given)


def _programs(source: BackwardSource, gl: Any) -> BackwardPrograms:
    made = function(gl)
    texts = (source.bare, source.pulled, source.score, source.kept)
    return BackwardPrograms(*map(made, texts), source.reads, source.bare_reads, tuple(map(made, source.loaders)))


def _finish(grid: int, given: Sequence[Any]) -> None:
    added, target, *numbers = given
    body = plain.spoken(finish, plain.language(grid))["finish"]
    plain.launch(body, grid, pointer(added), pointer(target), *numbers)


# --- what other launches make -----------------------------------------------------------------------


def _sums(self: HopperGradients) -> base.Sums:
    """As ``row_sums`` has them."""
    plan, lse = self.launches.sums, self.residual.lse
    assert lse is not None
    assert self.grad_lse is None
    query, key, _ = self.operands.qkv
    score = query.float() @ repeat_heads(key, query.shape[-3]).float().mT
    scope = Scope.whole(self.operands)
    u = evaluate(plan.masked_program, replace(scope, score=score)).expand(score.shape)
    highest = u.amax(-1)
    total = torch.exp2(plan.exponent * (u - highest[..., None])).sum(-1)
    # the lse of such rows has swallowed the log of how many keys there are
    faint = (lse < FAINT.value) & (highest > float("-inf")) & plan.uncertain
    strange = ((lse < FAINT.value) | lse.isnan()).any().to(torch.int32)
    return base.Sums(
        torch.where(faint, highest, lse / plan.factor),
        torch.where(faint, total.reciprocal(), 1.0),
        (self.residual.out.float() * self.grad_out.float()).sum(-1),
        strange if plan.uncertain else strange.new_empty(0),
        None,
    )


def _launcher(listing: Listing, device: torch.device) -> Callable[[Sequence[Tensor]], Tensor]:
    """As ``list_tiles`` has them, score by score; rows and keys of the listing are the other way round."""

    def lists(captures: Sequence[Tensor]) -> Tensor:
        sizes = (listing.batch, listing.heads, listing.rows, listing.keys)
        like = torch.empty(*sizes[:3], 1), torch.empty(*sizes[:2], listing.keys, 1)
        scope = Scope.whole(Operands.of_weights(*like, tuple(x.mT for x in captures), listing.symbols))
        keep = evaluate(listing.mask.program, scope).expand(sizes)
        m, n, (left, right) = torch.arange(listing.rows)[:, None], torch.arange(listing.keys), listing.band
        keep = keep & (n <= m + right) if listing.mask.right else keep
        keep = keep & (n >= m + left) if listing.mask.left else keep
        every = [_entries(rows, listing) for pair in keep.flatten(0, 1) for rows in pair.split(listing.mask.height)]
        return torch.tensor(every, dtype=torch.int32).view(*sizes[:2], listing.row_tiles, listing.length)

    return lists


def _entries(rows: Tensor, listing: Listing) -> list[int]:
    """How many tiles keep something, then they, from the last to the first; then what nobody may use."""
    tiles = list(enumerate(rows.split(listing.mask.width, dim=1)))
    width = listing.mask.width
    found = [2 * tile + int(not (part.all() and part.shape[1] == width)) for tile, part in tiles if part.any()]
    found = found[::-1] or [2 * tiles[-1][0] + 1]
    return [len(found), *found, *[2**30] * (listing.length - 1 - len(found))]


@pytest.fixture(name="launched")
def in_plain_python(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Every launch of a backward is one in plain Python; its name is ``launched``."""
    launched = Launched()
    monkeypatch.setattr(backward_plan, "build_backward", launched.build)
    monkeypatch.setattr(backward_plan, "_PLANS", {})
    monkeypatch.setattr(backward_plan.Listing, "launcher", _launcher)
    monkeypatch.setattr(base, "target_of", lambda device: Target.parse("cuda:sm90"))
    monkeypatch.setattr(gradients, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(gradients, "finish", _Launcher(_finish))
    monkeypatch.setattr(HopperGradients, "_sums", _sums)
    monkeypatch.setattr(gradients, "triton", DRIVER)
    return launched
