"""What is chosen for a GPU that is not here: decided by the cost model, whose order was measured on an H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnfuse.kernels import UNFUSED, Operand, Problem, choose, lookup
from attnfuse.kernels.gpu import cost, cudnn
from attnfuse.kernels.triton import kernel as triton_kernel
from attnfuse.target import Target
from tests.kernels.cases import SPECS

HOPPER = Target.parse("cuda:sm90")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for another machine is asked here as if Triton were installed, as it will be there."""
    monkeypatch.setattr(triton_kernel, "_installed", tuple)


def problem(name: str, *, rows: int = 4096, training: bool = False, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Batch 2, 32 query heads over 8, 4096 keys, heads of 128."""
    spec = SPECS[name]
    extent = dict(zip(spec.axes, (2, 32, rows, 4096), strict=True))
    captures = tuple(
        Operand(tuple(extent[a] if a in c.axes else 1 for a in spec.axes), dtype, training) for c in spec.captures
    )
    key = Operand((2, 8, 4096, 128), dtype, training)
    return Problem(spec, Operand((2, 32, rows, 128), dtype, training), key, key, captures, rows_kept=True)


@pytest.mark.parametrize("name", ["scaled", "causal"])
def test_cudnn_computes_what_it_can(name: str) -> None:
    for training in (False, True):
        found = choose(problem(name, training=training), HOPPER)
        assert found.pays
        assert found.kernel in ("cudnn", "gluon")


@pytest.mark.parametrize("name", ["softcap, causal", "alibi", "bias", "window", "sink", "padding", "documents"])
def test_masked_attention_is_fused(name: str) -> None:
    found = choose(problem(name), HOPPER)
    assert found.pays
    assert "cudnn" not in found.seconds
    # measured: Inductor takes four to twelve times as long
    assert found.seconds[UNFUSED] > 2 * found.seconds[found.kernel]


def test_a_bias_with_its_gradient_is_fused() -> None:
    """Measured: 7.1 ms against Inductor's 8.9 for a step."""
    trained = problem("bias", training=True)
    assert cost.triton(trained, HOPPER) < cost.unfused(trained, HOPPER)
    assert cost.triton(trained, HOPPER) > 2 * cost.triton(problem("softcap, causal", training=True), HOPPER)


def test_a_band_costs_what_it_reaches() -> None:
    full, causal = (cost.triton(problem(name), HOPPER) for name in ("scaled", "causal"))
    assert 0.45 < causal / full < 0.6


@pytest.mark.parametrize("target", ["rocm:gfx942", "rocm:gfx950", "xpu:pvc", "cuda:sm80", "cuda:sm100"])
def test_every_vendor_has_a_kernel(target: str) -> None:
    found = choose(problem("softcap, causal"), Target.parse(target))
    assert found.pays
    assert found.kernel == "triton"


@pytest.mark.parametrize(("here", "says", "taken"), [(HOPPER, True, True), (HOPPER, False, False), (None, True, False)])
def test_torch_is_asked_about_wide_heads(
    here: Target | None, says: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device that is meant, and on no other."""
    asked: list[tuple[int, bool]] = []

    def params(query: torch.Tensor, *_: object) -> None:
        asked.append((query.shape[-1], query.requires_grad))

    def made(*shape: int, device: str, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(Target, "of", lambda device: here)
    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(cudnn, "SDPAParams", params)
    monkeypatch.setattr(cudnn, "can_use_cudnn_attention", lambda given: says)
    cudnn._takes.cache_clear()
    wide = Operand((2, 8, 512, 256), torch.bfloat16, requires_grad=True)
    reasons = lookup("cudnn").reasons_against(Problem(SPECS["causal"], wide, wide, wide, rows_kept=True), HOPPER)
    cudnn._takes.cache_clear()
    assert (not reasons) is taken, reasons
    assert asked == ([(256, True)] if here else [])


def test_refusals_name_what_is_missing() -> None:
    reasons = {c.name: c.reasons for c in choose(problem("softcap, causal"), HOPPER).candidates}
    assert "SDPA has no softcap" in reasons["cudnn"]
    assert reasons["blocked"] == ("runs on cpu, not on cuda",)
