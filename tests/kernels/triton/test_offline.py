"""The shipped schedules, compiled for devices that are not here: matrix instructions as computed, and no spills."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests.kernels.cases import SPECS, spec

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.kernels.triton.offline import Compiled, Sizes, compiled, compiled_backward, compiled_weights

#: Of each target its matrix instruction, and the compiler's text that it stands in.
INSTRUCTION = {
    "cuda:sm80": ("ptx", r"mma\.sync\.aligned\.m16n8k16"),
    "cuda:sm90": ("ptx", r"wgmma\.mma_async"),
    "cuda:sm100": ("ptx", r"tcgen05\.mma"),
    "rocm:gfx942": ("amdgcn", r"v_mfma_f32_\d+x\d+x\d+_bf16"),
    "rocm:gfx950": ("amdgcn", r"v_mfma_f32_\d+x\d+x\d+_bf16"),
    "rocm:gfx1100": ("amdgcn", r"v_wmma_f32_16x16x16_bf16"),
}
#: Bytes of shared memory that a program may have.
SHARED = {
    "cuda:sm80": 166_912,
    "cuda:sm90": 232_448,
    "cuda:sm100": 232_448,
    "rocm:gfx942": 65_536,
    "rocm:gfx950": 163_840,
    "rocm:gfx1100": 65_536,
}
FULL = Sizes(1, 8, 2, 1024, 1024, 128, 128)


def products(found: Compiled, target: str) -> int:
    return found.count(*INSTRUCTION[target])


@pytest.mark.parametrize("target", INSTRUCTION)
def test_shipped_schedules_use_matrix_units_and_do_not_spill(target: str) -> None:
    plain, causal = (compiled(target, SPECS[name], FULL) for name in ("scaled", "causal"))
    # one loop of two products, and for the tiles on the diagonal another
    assert products(causal, target) == 2 * products(plain, target) > 0
    for found in (plain, causal):
        assert found.resources()["spills"] == 0
        assert found.shared <= SHARED[target]


@pytest.mark.parametrize(("width", "rows", "keys", "waves"), [(64, 128, 64, 8), (128, 64, 16, 4), (256, 32, 16, 8)])
def test_consumer_cards_multiply_by_wmma(width: int, rows: int, keys: int, waves: int) -> None:
    """Two products of tiles of 16, shared by the waves; where rows are fewer than 16 a wave, waves share columns."""
    found = compiled("rocm:gfx1100", SPECS["scaled"], Sizes(1, 8, 2, 1024, 1024, width, width))
    down = min(waves, rows // 16)
    across = waves // down
    first = (rows // 16 // down) * max(keys // 16 // across, 1) * (width // 16)
    second = (rows // 16 // down) * (width // 16 // across) * (keys // 16)
    assert products(found, "rocm:gfx1100") == first + second
    assert found.resources()["spills"] == 0


@pytest.mark.parametrize("target", INSTRUCTION)
def test_weights_are_computed_by_matrix_units_without_spills(target: str) -> None:
    plain, causal = (compiled_weights(target, SPECS[name], FULL) for name in ("scaled", "causal"))
    # two walks, and for the tiles on the diagonal two more
    assert products(causal, target) == 2 * products(plain, target) > 0
    for found in (plain, causal):
        assert found.resources()["spills"] == 0
        assert found.shared <= SHARED[target]


def test_hopper_multiplies_by_wgmma_and_loads_by_descriptor() -> None:
    found = compiled("cuda:sm90", SPECS["causal"], FULL)
    # a tile of 64 x 64 x 128: 128 / 16 for the first product and 64 / 16 for the second, in two loops
    assert products(found, "cuda:sm90") == 2 * (128 // 16 + 64 // 16)
    assert found.count("ptx", r"mma\.sync") == 0
    assert found.count("ttir", r"tt\.descriptor_load") == 4


def test_ponte_vecchio_loads_keys_and_values_by_descriptor() -> None:
    """Intel's compiler is not at hand: this is what it would be given, as the CUDA target's first stage has it."""
    from attnfuse.kernels.triton.tables import Shape, schedule_for
    from attnfuse.target import Target

    schedule = schedule_for(Target.parse("xpu:pvc"), Shape(128, 128, 2, banded=False, rows=1024))
    found = compiled("cuda:sm90", SPECS["scaled"], FULL, replace(schedule, knobs=()))
    assert found.count("ttir", r"tt\.descriptor_load") == 2
    assert found.count("ttir", r"= tt\.load ") == 1, "the query alone"


def test_every_feature_compiles() -> None:
    for target, names in (
        ("cuda:sm90", ("bias", "sink", "dropout")),
        ("rocm:gfx942", ("softcap, causal", "documents")),
    ):
        for name in names:
            assert products(compiled(target, SPECS[name], Sizes(1, 2, 2, 200, 200, 64, 64), with_lse=True), target)


def test_a_backward_with_a_full_bias_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages of keys, values and the bias nearly fill it at heads of 128."""
    target = "cuda:sm90"
    found = compiled_backward(monkeypatch, target, spec("0.3 * s + t0", "bfloat16[h,m,n]"), FULL)
    assert set(found) == {"row_sums", "rows_gradient", "keys_gradient"}
    for kernel in found.values():
        assert products(kernel, target) > 0
        assert kernel.shared <= SHARED[target]
    assert found["rows_gradient"].resources()["spills"] == 0


@pytest.mark.parametrize("target", ["cuda:sm90", "cuda:sm80", "rocm:gfx942"])
def test_a_bias_that_batches_share_has_room_with_wide_heads(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Its gradient is summed by a launch of its own, whose tiles took 400 KiB with heads of 256."""
    for width in (128, 256):
        sizes = Sizes(8, 2, 2, 256, 256, width, width)
        found = compiled_backward(monkeypatch, target, spec("0.3 * s + t0", "bfloat16[h,m,n]"), sizes)
        assert found["captured_gradient"].shared <= SHARED[target]
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["scaled", "causal", "dropout"])
def test_on_hopper_dk_and_dv_of_wide_heads_are_computed_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All by wgmma, tiles of 128 and 32, and nothing spills."""
    target, width = "cuda:sm90", 256
    found = compiled_backward(monkeypatch, target, SPECS[name], Sizes(1, 2, 2, 1024, 1024, width, width))
    del found["row_sums"]
    loops = 2 if name == "causal" else 1
    of_scores, of_a_gradient = width // 16, 32 // 16
    assert {each: products(kernel, target) for each, kernel in found.items()} == {
        "rows_gradient": loops * (2 * of_scores + of_a_gradient),
        "keys_gradient": 2 * of_scores + of_a_gradient,
        "keys_gradient, again": of_scores + of_a_gradient,
    }
    for kernel in found.values():
        assert kernel.count("ptx", r"mma\.sync") == kernel.resources()["spills"] == 0
        assert kernel.shared <= SHARED[target]


def test_the_masked_and_the_unmasked_tiles_run_two_programs() -> None:
    """Two functions of one name were one to Triton once, and no mask was applied."""
    found = compiled("cuda:sm90", SPECS["causal"], FULL)
    assert found.count("ttir", r"arith\.cmpi sle, .*tensor<64x64xi32>") == 1


def test_float32_keeps_its_precision_unless_tf32_is_allowed() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    counts = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found = compiled("cuda:sm90", SPECS["scaled"], Sizes(1, 2, 2, 256, 256, 64, 64), dtype=torch.float32)
            counts[allowed] = found.count("ttir", "inputPrecision = tf32x3")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert counts == {False: 2, True: 0}
