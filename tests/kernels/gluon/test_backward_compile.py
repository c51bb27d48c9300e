"""What compilers make of the backward body, without a GPU: tensor cores, copies, waits and registers as designed."""

from __future__ import annotations

import re
from functools import cache
from unittest import mock

import pytest
import torch

from attnfuse.kernels import Residual
from attnfuse.operands import Operands
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import spec as _spec

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon.backward_build import BackwardSource, build_backward
from attnfuse.kernels.gluon.backward_plan import backward_sourced
from attnfuse.kernels.triton import gradients
from attnfuse.kernels.triton.gradients import Gradients
from tests.kernels.gluon.test_compile import _assembled, waits

SPECS = {
    "full": _spec("0.1 * s"),
    "causal": _spec("where(n <= m, 0.1 * s, -inf)"),
    "window": _spec("where((n <= m) & (n >= m - 100), 0.1 * s, -inf)"),
    "softcap": _spec("where(n <= m, 50.0 * tanh(0.1 * s / 50.0), -inf)"),
    "slopes": _spec("where(n <= m, 0.1 * s + t0 * (n - m), -inf)", "float32[h]"),
    "bias": _spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]"),
    "float32 bias": _spec("0.1 * s + t0", "float32[h,m,n]"),
    "documents": _spec("where(t0 == t1, 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
    "bias of documents": _spec(
        "where((n <= m) & (t0 == t1), 0.1 * s + t2, -inf)", "int64[b0,m]", "int64[b0,n]", "bfloat16[b0,h,m,n]"
    ),
    "bias in a window": _spec(
        "where((n <= m) & (n >= m - 100), 0.1 * s + t0 + t1, -inf)", "bfloat16[b0,h,m,n]", "float32[b0,h,m]"
    ),
    "causal documents": _spec("where((n <= m) & (t0 == t1), 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
}
#: Bytes that a thread spills with heads of 128; in the loop none of a full attention's.
SPILLED = {"full": 0, "causal": 0, "window": 0, "softcap": 160, "slopes": 32, "bias": 64, "float32 bias": 64,
           "documents": 32, "bias of documents": 240, "bias in a window": 360, "causal documents": 180}  # fmt: skip
ROWS = 1024


def sourced(spec: AttentionSpec, width: int) -> BackwardSource:
    """What a launch of 1024 rows and keys compiles, on a Hopper GPU; gradients are asked for of all that is float."""
    query = torch.empty(1, 2, ROWS, width, dtype=torch.bfloat16)
    sizes = {"b0": 1, "h": 2, "m": ROWS, "n": ROWS}
    shapes = [[sizes[axis] if axis in each.axes else 1 for axis in spec.axes] for each in spec.captures]
    types = [getattr(torch, each.dtype) for each in spec.captures]
    captures = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True))
    operands = Operands(query, query, query, captures)
    residual = Residual(query, torch.empty(1, 2, ROWS))
    needs = [True] * 3 + [x.is_floating_point() for x in captures]
    with mock.patch.object(gradients, "target_of", return_value=Target.parse("cuda:sm90")):
        return backward_sourced(Gradients(spec, query, operands, needs, residual))[0]


@cache
def compiled(name: str, width: int) -> tuple[BackwardSource, str, str, int]:
    """What was compiled, the PTX, what ptxas says of it, and bytes of shared memory."""
    source = sourced(SPECS[name], width)
    kernel = build_backward(source)
    ptx = str(kernel.asm["ptx"])
    return source, ptx, _assembled(ptx), kernel.metadata.shared


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", SPECS)
def test_registers_and_shared_memory_suffice(name: str, width: int) -> None:
    _, _, report, shared = compiled(name, width)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert spilled is not None
    assert int(spilled.group(1)) <= (SPILLED[name] if width > 64 else 0)
    assert "serialized" not in report
    assert "setmaxnreg" not in report
    assert shared <= 232448


@pytest.mark.parametrize("width", [64, 128])
def test_products_and_copies(width: int) -> None:
    source, ptx, _, _ = compiled("full", width)
    meta = source.meta
    # S and dP over the width, dV and dK over the rows of a tile, dQ over its keys
    products = 2 * width // 16 + 2 * meta.block_m // 16 + meta.block_n // 16
    assert ptx.count("wgmma.mma_async") == products
    # Q, K, V and the output's gradient in rows of 128 bytes; dK and dV leave alike
    assert ptx.count("cp.async.bulk.tensor.4d.shared") == 4 * (width // 64)
    assert ptx.count("cp.async.bulk.tensor.4d.global") >= 2
    # dQ is added to memory as one piece, stored four numbers at a time, without conflicts of banks; the compiler may
    # take the first tile, which frees no room, out of the loop
    assert ptx.count("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add") in (1, 2)
    assert len(re.findall(r"st\.shared\.v4", ptx)) == meta.block_m * width // 256 // 4


def test_products_overlap_what_is_computed() -> None:
    """The exponents run beside dP, the gradient of scores beside dV, dQ leaves beside dV and dK."""
    order = waits(compiled("full", 128)[1])
    loop = ["product", "product", "wait 1", "exp", "product", "wait 1", *["product"] * 3, "wait 2", "wait 0"]
    assert order == loop


def test_what_is_told_of_a_tile_is_stored_before_its_barrier_is_arrived_at() -> None:
    """By every lane, then they meet, then one arrives: racecheck does not follow barriers that copies complete."""
    ptx = compiled("causal", 128)[1]
    found = re.findall(r"st\.shared\.b64|bar\.warp\.sync|mbarrier\.(?:arrive\.expect_tx|arrive|try_wait)", ptx)
    told = [place for place, each in enumerate(found) if each == "st.shared.b64"]
    assert told
    for place in told:
        assert found[place - 1] == "mbarrier.try_wait", "the room of the last tile that it was told of is free"
        assert found[place + 1 : place + 3] == ["bar.warp.sync", "mbarrier.arrive.expect_tx"]
