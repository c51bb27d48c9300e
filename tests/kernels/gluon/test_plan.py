"""What a launch is given, without a GPU: the launcher is a recorder."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnfuse.kernels import lookup
from attnfuse.target import Target
from tests.kernels.cases import SIZES, SPECS, Case, Sizes, case, spec

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon import launch, plan
from attnfuse.kernels.gluon.build import Source
from attnfuse.kernels.gluon.forward import attention_forward

NAMES = attention_forward.arg_names


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Source, dict[str, Any]]]:
    """Every launch: what was compiled for it, and its arguments by name."""
    found: list[tuple[Source, dict[str, Any]]] = []

    class Kernel:
        def __init__(self, source: Source) -> None:
            self.source = source

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*given: Any, stream: int) -> None:
                found.append((self.source, {**dict(zip(NAMES, given, strict=True)), "grid": grid}))

            return run

    active = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(plan, "build", Kernel)
    monkeypatch.setattr(plan, "_PLANS", {})
    monkeypatch.setattr(plan, "_processors", lambda device: 132)
    monkeypatch.setattr(launch, "_counter", lambda device, stream: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(
        launch, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    return found


def run(given: Case) -> None:
    lookup("gluon").run_with_lse(given.spec, given.operands)


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_is_given(name: str, launched: list[tuple[Source, dict[str, Any]]]) -> None:
    given = case(SPECS[name], SIZES["grouped heads"], torch.bfloat16)
    if lookup("gluon").reasons_against(given.problem(), Target.parse("cuda:sm90")):
        pytest.skip("refused")
    run(given)
    ((source, call),) = launched
    assert (call["heads"], call["group"], call["rows"], call["keys"]) == (6, 3, 31, 31)
    assert call["grid"] == (2 * 6, 1, 1)
    assert len(call["captures"]) == len(source.captures) == len(source.reads)
    assert len(call["strides"]) == len(source.strides)
    assert source.meta.lse
    assert source.meta.ragged


@pytest.mark.parametrize("batch", [(), (2,)])
def test_descriptors_have_four_dimensions(
    batch: tuple[int, ...], launched: list[tuple[Source, dict[str, Any]]]
) -> None:
    """The panel's too, where attention has no batch."""
    of = spec("0.1 * s + t0", "bfloat16[h,m,n]", batch=len(batch))
    run(case(of, Sizes(batch, 4, 2, 128, 256, 64, 64), torch.bfloat16))
    ((source, call),) = launched
    assert source.meta.panel
    described = [call[name] for name in ("q_desc", "k_desc", "v_desc", "o_desc", "panel_desc")]
    assert {len(each.shape) for each in described} == {len(each.strides) for each in described} == {4}
    assert call["panel_desc"].shape == (1, 4, 128, 256)


def test_a_plan_is_made_once(launched: list[tuple[Source, dict[str, Any]]]) -> None:
    given = case(SPECS["causal"], SIZES["odd"], torch.bfloat16)
    run(given)
    run(given)
    assert len(launched) == 2
    assert len(plan._PLANS) == 1


@pytest.mark.parametrize(
    ("name", "band", "skips"),
    [
        ("causal", (0, 0), (False, True)),
        ("causal, finite fill", (0, 0), (False, True)),
        ("window", (-5, 0), (True, True)),
        ("causal, rows of equal weights", (0, 0), (False, False)),
        ("causal, mild fill", (0, 0), (False, False)),
        ("fill of one", (0, 0), (False, False)),
    ],
)
def test_keys_are_left_out_only_where_they_have_no_weight(
    name: str, band: tuple[int, int], skips: tuple[bool, bool], launched: list[tuple[Source, dict[str, Any]]]
) -> None:
    run(case(SPECS[name], SIZES["grouped heads"], torch.bfloat16))
    ((source, call),) = launched
    assert (source.meta.left, source.meta.right) == skips
    assert (call["left"], call["right"]) == band
    assert (source.score is None) is any(skips)


def test_operands_that_tma_cannot_load_are_copied(launched: list[tuple[Source, dict[str, Any]]]) -> None:
    given = case(SPECS["scaled"], SIZES["odd"], torch.bfloat16)
    run(given)
    run(given.transposed())
    run(replace(given, key=given.key[:, :1].expand_as(given.key)))
    descriptors = [call["k_desc"] for _, call in launched]
    assert descriptors[0].base is given.key
    for descriptor in descriptors:
        assert descriptor.strides == descriptor.base.stride()
        assert descriptor.strides[-1] == 1
        assert all(stride > 0 and stride % 8 == 0 for stride in descriptor.strides[:-1])


def test_groups_fit_the_cache_and_end_busy() -> None:
    pairs = 128
    # 12 pairs of 2 MB fit; the last group has two items a processor
    assert plan._together(pairs, 2 << 20, 32, 132) == 12
    assert plan._together(pairs, 16 << 20, 32, 132) == 9
    # all of memory is not asked for at once
    assert plan._together(pairs, 1 << 18, 4, 132) == 33
    assert plan._together(2, 1 << 18, 4, 132) == 2


def test_a_mask_is_listed_before_each_launch(
    launched: list[tuple[Source, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[int] = []

    def launcher(listing: Any, device: object) -> Any:
        def lists(captures: Any) -> torch.Tensor:
            listed.append(len(captures))
            return torch.zeros(listing.batch, listing.heads, listing.row_tiles, listing.length, dtype=torch.int32)

        return lists

    monkeypatch.setattr(plan.Listing, "launcher", launcher)
    given = case(SPECS["documents"], replace(SIZES["odd"], heads=2, kv_heads=2, rows=300, keys=1030), torch.bfloat16)
    run(given)
    run(given)
    assert listed == [2, 2]
    _, call = launched[-1]
    assert call["lists"].shape == (2, 1, 3, 1030 // 128 + 3)
    assert (call["list_batch"], call["list_head"], call["list_length"]) == (3, 0, 1030 // 128 + 3)
    # what depends on sizes alone is listed once
    run(case(SPECS["prefix"], replace(SIZES["odd"], rows=300, keys=1030), torch.bfloat16))
    assert listed == [2, 2, 0]
