"""Float8 compiled for devices that are not here: matrix units multiply it where the spec and the device allow that."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from attnfuse.spec import AttentionSpec
from tests.kernels.cases import spec

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.kernels.triton.offline import Sizes, compiled

FULL = Sizes(1, 8, 2, 1024, 1024, 128, 128)
#: What multiplies float8, by target and the type that it multiplies.
INSTRUCTION = {
    ("cuda:sm90", "float8_e4m3fn"): ("ptx", r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3"),
    ("cuda:sm90", "float8_e5m2"): ("ptx", r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e5m2\.e5m2"),
    ("rocm:gfx942", "float8_e4m3fnuz"): ("amdgcn", r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8"),
    ("rocm:gfx950", "float8_e4m3fn"): ("amdgcn", r"v_mfma_f32_\w+f8\w*|v_mfma_f32_\w+fp8_fp8"),
}

#: What multiplies bfloat16, there and elsewhere.
WIDE = r"wgmma\S+\.bf16\.bf16|v_mfma_f32_\w+_bf16"


def scaled(dtype: str) -> AttentionSpec:
    """A scale for each head of query, key and value, and weights that are rounded: what ``fp8_attention`` writes."""
    of = spec("0.3 * (t0 * t1 * s)", *["float32[b0,h]"] * 3, weight="t2 * p", out_dtype="bfloat16")
    return replace(of, weight_dtype=dtype)


@pytest.mark.parametrize(("target", "dtype"), INSTRUCTION)
def test_matrix_units_multiply_float8(target: str, dtype: str) -> None:
    found = compiled(target, scaled(dtype), FULL, dtype=getattr(torch, dtype), value_minor="n")
    spec = replace(scaled(dtype), weight_dtype=None)
    exactly = compiled(target, spec, FULL, dtype=getattr(torch, dtype), value_minor="n")
    stage, _ = INSTRUCTION[target, dtype]
    # weights that may not be rounded are multiplied in bfloat16, the scores all the same
    assert min(each.count(*INSTRUCTION[target, dtype]) for each in (found, exactly)) > 0
    assert found.count(stage, WIDE) == 0 < exactly.count(stage, WIDE)
    assert found.resources()["spills"] == 0
    for each in (found, exactly):
        assert each.shared <= {"cuda:sm90": 232_448, "rocm:gfx942": 65_536, "rocm:gfx950": 163_840}[target]


def test_hopper_multiplies_weights_in_float8_where_values_lie_transposed() -> None:
    """Its matrix units sum over the contiguous dimension: to turn rows of values byte by byte takes longer."""
    straight, turned = (
        compiled("cuda:sm90", scaled("float8_e4m3fn"), FULL, dtype=torch.float8_e4m3fn, value_minor=minor)
        for minor in ("d", "n")
    )
    assert straight.count("ptx", r"wgmma\S+f32\.bf16\.bf16") > 0
    assert turned.count("ptx", r"wgmma\S+f32\.bf16\.bf16") == 0
    # units that sum all keys would keep 14 bits of the sum
    assert turned.count("ttgir", r"arith\.addf .*tensor<\d+x128xf32") == 1
    for each in (straight, turned):
        assert each.count("ptx", r"st\.shared\.b8") == 0
        assert each.count("ttir", r"tt\.descriptor_load") == 2


def test_formats_that_a_device_has_no_units_for_are_widened() -> None:
    found = compiled("rocm:gfx942", scaled("float8_e4m3fn"), FULL, dtype=torch.float8_e4m3fn)
    assert found.count("amdgcn", r"v_mfma_f32_\d+x\d+x\d+_bf16") > 0
    assert found.count("amdgcn", r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8") == 0


def test_decoding_from_a_float8_cache_compiles() -> None:
    few = replace(FULL, rows=1, keys=4096)
    assert compiled("cuda:sm90", scaled("float8_e4m3fn"), few, dtype=torch.float8_e4m3fn).asm
