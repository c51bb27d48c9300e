"""The promise that every trap is held against: fused rightly, or refused with a reason, and never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import as_module, rewritten

__all__ = ["never_wrong", "qkv"]


def qkv(
    batch: int = 2, heads: int = 4, rows: int = 6, keys: int = 9, depth: int = 8, *, kv_heads: int = 0, depth_v: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query ``[B, H, M, D]``, key ``[B, Hkv, N, D]`` and value ``[B, Hkv, N, Dv]``, float32."""
    kv_heads, depth_v = kv_heads or heads, depth_v or depth
    return (
        torch.randn(batch, heads, rows, depth),
        torch.randn(batch, kv_heads, keys, depth),
        torch.randn(batch, kv_heads, keys, depth_v),
    )


def never_wrong(
    door: str, attention: Callable[..., Any], *args: Tensor, sites: int | None = 1, **options: Any
) -> Report:
    """Rewrites ``attention`` and compares results, and what it does to its arguments, with the source's.

    The exact result is the source's in float64, so ``attention`` names no floating dtype. ``sites`` is how many places
    look like attention, None where that may be seen either way: each is fused, or refused for a stated reason.
    """
    program = rewritten(door, as_module(attention), _copies(args), **options)
    source_args, fused_args = _copies(args), _copies(args)
    exact_args = tuple(x.double() if x.is_floating_point() else x.clone() for x in args)
    source, fused, exact = attention(*source_args), program.run(*fused_args), attention(*exact_args)
    before = zip(_all(fused, fused_args), _all(source, source_args), _all(exact, exact_args), strict=True)
    for ours, theirs, truth in before:
        if theirs.is_floating_point():
            assert_as_good(ours, theirs, truth)
        else:
            assert torch.equal(ours, theirs)
    assert sites is None or len(program.report.sites) == sites, program.report
    for site in program.report.refused:
        # a rewrite that its own certificate stopped was stopped in time, but is a bug all the same
        assert len(site.reason.split()) > 2, program.report
        assert "bug of attnfuse" not in site.reason, program.report
    return program.report


def _copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in args)


def _all(result: Any, args: tuple[Tensor, ...]) -> list[Tensor]:
    """Every tensor that the caller can see afterwards."""
    return [*([result] if isinstance(result, Tensor) else result), *args]
