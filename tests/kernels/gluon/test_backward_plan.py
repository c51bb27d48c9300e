"""What a backward is launched with, without a GPU: the launcher is a recorder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.kernels import Residual
from attnfuse.kernels.triton import gradients as base
from attnfuse.score import P
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import MIN, SPECS, Sizes, case, spec

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon import backward_plan, gradients
from attnfuse.kernels.gluon.backward import attention_backward
from attnfuse.kernels.gluon.backward_build import BackwardSource
from attnfuse.kernels.gluon.gradients import HopperGradients

NAMES = attention_backward.arg_names
SIZES = Sizes((2,), 4, 2, 1160, 1000, 128, 128)
BIAS = spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]")
Launches = list[tuple[BackwardSource, dict[str, Any]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every launch: what was compiled for it, and its arguments by name."""
    found: Launches = []

    class Kernel:
        def __init__(self, source: BackwardSource) -> None:
            self.source = source

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*given: Any, stream: int) -> None:
                found.append((self.source, {**dict(zip(NAMES, given, strict=True)), "grid": grid}))

            return run

    def launcher(listing: Any, device: object) -> Any:
        def lists(captures: Any) -> Tensor:
            return torch.full((listing.batch, listing.heads, listing.row_tiles, listing.length), len(captures))

        return lists

    active = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(backward_plan, "build_backward", Kernel)
    monkeypatch.setattr(backward_plan, "_PLANS", {})
    monkeypatch.setattr(backward_plan.Listing, "launcher", launcher)
    monkeypatch.setattr(base, "target_of", lambda device: Target.parse("cuda:sm90"))
    monkeypatch.setattr(gradients, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(gradients, "_finish", lambda plan, added, target: None)
    monkeypatch.setattr(HopperGradients, "_sums", _no_sums)
    monkeypatch.setattr(HopperGradients, "_through_scores", lambda self, slot, sums: torch.tensor(7.0))
    monkeypatch.setattr(
        gradients, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    return found


def _no_sums(self: HopperGradients) -> base.Sums:
    query = self.operands.query
    one = query.new_zeros(query.shape[:-1], dtype=torch.float32)
    return base.Sums(one, one, one, torch.zeros(1, dtype=torch.int32), None)


def run(of: AttentionSpec, sizes: Sizes = SIZES, wanted: tuple[bool, ...] | None = None) -> tuple[Tensor | None, ...]:
    given = case(of, sizes, torch.bfloat16)
    needs = wanted or tuple(x.is_floating_point() for x in given.tensors)
    residual = Residual(given.query, torch.zeros(given.query.shape[:-1]))
    return HopperGradients(given.spec, given.query, given.operands, needs, residual).run()


@pytest.mark.parametrize("name", ["plain", "causal", "window", "documents", "prefix", "bias", "everything"])
def test_every_parameter_is_given(name: str, launched: Launches) -> None:
    run(replace(SPECS[name], dropout=0.0, weight=P))
    ((source, call),) = launched
    assert (call["heads"], call["group"], call["rows"], call["keys"]) == (4, 2, 1160, 1000)
    assert call["grid"] == (2 * 2 * 8, 1, 1)
    assert len(call["captures"]) == len(source.captures) == len(source.reads) == len(source.bare_reads)
    assert len(call["strides"]) == len(source.strides)
    assert (call["lists"] is not None) == source.meta.listed == (name in ("documents", "prefix", "everything"))
    assert (call["panel_desc"] is not None) == source.meta.panel == (name == "bias")


def test_lists_are_made_before_each_launch_or_once(launched: Launches) -> None:
    run(SPECS["documents"])
    _, call = launched[-1]
    # of each batch, and of eight tiles of keys the rows' nineteen
    assert call["lists"].shape == (2, 1, 8, 19 + 2)
    assert (call["list_batch"], call["list_head"], call["list_length"]) == (8, 0, 21)
    assert int(call["lists"].flatten()[0]) == 2
    run(SPECS["prefix"])
    _, call = launched[-1]
    assert call["lists"].shape == (1, 1, 8, 21)
    assert int(call["lists"].flatten()[0]) == 0


def test_a_row_that_keeps_nothing_has_no_gradient_anywhere(launched: Launches) -> None:
    """Behind a finite fill it weighs all keys: those behind the band too."""
    run(spec(f"where((n <= m) & t0, 0.3 * s, {MIN})", "bool[b0,n]"))
    ((source, call),) = launched
    assert source.meta.filled
    assert call["lists"] is not None
    assert source.kept is not None
    assert "n <= m" in source.kept
    # the band says which tiles there are, so the lists need not ask
    assert "n <= m" not in source.bare


def test_few_rows_and_mild_fills_are_not_listed(launched: Launches) -> None:
    run(SPECS["documents"], replace(SIZES, rows=300))
    run(spec("where(t0, 0.3 * s, -100.0)", "bool[b0,n]"))
    assert [source.meta.listed for source, _ in launched] == [False, False]


def test_what_multiplies_every_score_does_so_at_the_end(launched: Launches) -> None:
    run(SPECS["two biases"])
    run(spec(f"where((n <= m) & t0, 5.0 * tanh(0.3 * s / 5.0), {MIN})", "bool[b0,n]"))
    assert all(call["factor"] == pytest.approx(0.3) for _, call in launched)


@pytest.mark.parametrize(
    ("score", "captured", "written"),
    [
        ("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]", "added"),
        ("0.1 * s + t0", "bfloat16[b0,h,m,n]", "written"),
        ("0.1 * s + t0", "bfloat16[b0,m,n]", "added"),
        # eight heads' gradients are too many for a half type
        ("0.1 * s + t0", "bfloat16[m,n]", ""),
        ("0.1 * s + 2.0 * t0", "bfloat16[h,m,n]", ""),
        ("5.0 * tanh((0.1 * s + t0) / 5.0)", "bfloat16[h,m,n]", "added"),
        ("5.0 * tanh(0.1 * s / 5.0) + t0", "bfloat16[h,m,n]", ""),
    ],
)
def test_which_biases_have_the_gradient_of_the_scores(
    score: str, captured: str, written: str, launched: Launches
) -> None:
    found = run(spec(score, captured))
    ((source, call),) = launched
    assert (source.meta.panel_gradient, source.meta.panel_added) == (written != "", written == "added")
    grad = found[3]
    assert grad is not None
    if written:
        assert call["dpanel_desc"].base is grad
        # what is added to, or left out, is zero first
        assert written == "written" or not grad.any()
    else:
        assert float(grad) == 7.0


def test_a_bias_without_a_gradient_is_only_read(launched: Launches) -> None:
    assert run(BIAS, wanted=(True, True, True, False))[3] is None
    ((source, call),) = launched
    assert source.meta.panel
    assert call["dpanel_desc"] is None
