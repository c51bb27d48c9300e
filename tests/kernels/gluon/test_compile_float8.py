"""What compilers make of the body for float8, without a GPU: both products in float8, and no thread asks another."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.plan import sourced
from attnfuse.kernels.gluon.tuned import choices, tuned
from tests.kernels.cases import spec
from tests.kernels.gluon.test_compile import compiled, disassembled, exponents_between_waits, waits

FLOAT8 = {"fp8e4nv": "e4m3", "fp8e5": "e5m2"}
HEADROOM = {"fp8e4nv": 8.0, "fp8e5": 15.0}
#: Every body that is used without a program, by the widths of heads, and those that might be.
BODIES = {
    f"{width}, {value_width}{', causal' if right else ''}": tuned(
        width, value_width, 8192, left=False, right=right, narrow=True
    ).having(right=right)
    for width, value_width, right in ((64, 64, False), (128, 128, False), (128, 128, True), (64, 128, False))
}
CHOICES = {str(at): meta for at, meta in enumerate(choices(128, 128, narrow=True)) if not meta.dynamic}
(OVERLAPPED,) = (meta for meta in CHOICES.values() if meta.overlapped)
#: Bytes that a thread of three consumers spills, around the loop over tiles.
SPILLED = {3: 96, 2: 0}
PROGRAMS = {
    "scales": spec("0.1 * (t0 * t1 * s)", "float32[b0,h,m]", "float32[b0,h,n]", "float32[h]", weight="t2 * p"),
    "softcap": spec("where(n <= m, 50.0 * tanh(0.1 * s / 50.0), -inf)"),
    "slopes": spec("where(n <= m, 0.1 * s + t0 * (n - m), -inf)", "float32[h]"),
    "window, sinks": spec("where((n <= m) & (n >= m - 100), 0.1 * s, -inf)", "float16[h]", sink="2.0 * t0"),
    "documents": spec("where(t0 == t1, 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
    "bias": spec("0.1 * s + t0", "bfloat16[h,m,n]"),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "fp8e4nv") for name in [*BODIES, *CHOICES]), ("128, 128", "fp8e5")]
)
def test_products_are_of_float8_and_weights_stay_where_they_are(name: str, dtype: str) -> None:
    meta = {**BODIES, **CHOICES}[name].having(headroom=HEADROOM[dtype])
    ptx, report = compiled(Source(meta, dtype, out="bf16"))
    _check(meta, report)
    kind = FLOAT8[dtype]
    assert ptx.count("wgmma.mma_async") == len(re.findall(rf"wgmma\S+k32\.f32\.{kind}\.{kind}", ptx))
    products = (2 if meta.overlapped else 1) * (meta.head_block // 32 + meta.block_n // 32)
    assert ptx.count("wgmma.mma_async") == meta.consumers * products
    # rows of 128 bytes, one copy each: Q of every consumer, values; and two halves of the keys
    assert ptx.count("cp.async.bulk.tensor.4d.shared") == meta.consumers + max(meta.block_n // 128, 1)
    assert ptx.count("cp.async.bulk.tensor.5d.shared") == 2
    # four threads share a row: of two rows its maximum at each place, its sum at the end; no weight changes threads
    places = 3 if meta.overlapped else 2
    assert ptx.count("shfl.sync.bfly") == 4 * places * meta.consumers


def _check(meta: Meta, report: str) -> None:
    """Nothing spilled but what waits for the loop to end, and no product waits for another."""
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert spilled is not None
    assert int(spilled.group(1)) <= SPILLED[meta.consumers]
    assert "serialized" not in report


def test_nothing_is_spilled_from_tile_to_tile(tmp_path: Path) -> None:
    """From a tile's first product to its last: what three consumers spill waits outside."""
    source = Source(BODIES["128, 128"].having(headroom=8.0, lse=True), "fp8e4nv", out="bf16")
    parts = re.split("QGMMA", "\n".join(disassembled(_cubin(source, tmp_path))))
    tiles = [part for part in parts if "MUFU.EX2" in part]
    assert len(tiles) == source.meta.consumers
    assert not any(re.search(r"\b(LDL|STL)\b", part) for part in tiles)
    assert any(re.search(r"\b(LDL|STL)\b", part) for part in parts)


def test_softmax_runs_beside_a_product() -> None:
    meta = OVERLAPPED.having(headroom=8.0)
    order = waits(compiled(Source(meta, "fp8e4nv", out="bf16"))[0])
    loop = ["product", "product", "wait 1", "exp", "wait 0"]
    assert sum(order[place : place + len(loop)] == loop for place in range(len(order))) == meta.consumers


def test_exponents_stay_ahead_of_the_wait(tmp_path: Path) -> None:
    """Two rows of a thread, 32 weights each, while the last tile's output is on its way."""
    source = Source(OVERLAPPED.having(headroom=8.0), "fp8e4nv", out="bf16")
    assert exponents_between_waits(_cubin(source, tmp_path)) >= 64


def _cubin(source: Source, folder: Path) -> Path:
    kernel: Any = build(source)
    path = folder / "forward.cubin"
    path.write_bytes(kernel.asm["cubin"])
    return path


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_compile(name: str) -> None:
    of = replace(PROGRAMS[name], weight_dtype="float8_e4m3fn", out_dtype="float16")
    query = torch.empty(2, 4, 2000, 128, dtype=torch.float8_e4m3fn, device="meta")
    sizes = {"b0": 2, "h": 4, "m": 2000, "n": 2000}
    captures = [
        torch.empty([sizes[a] if a in c.axes else 1 for a in of.axes], dtype=getattr(torch, c.dtype), device="meta")
        for c in of.captures
    ]
    facts = tuple((x.shape, x.stride(), x.dtype) for x in (query, query, query, *captures))
    source, *_ = sourced(of, facts, (), with_lse=True)
    assert (source.dtype, source.value, source.out) == ("fp8e4nv", "fp8e4nv", "fp16")
    assert (source.factor is not None) is (name == "scales")
    assert not source.meta.panel
    _check(source.meta, compiled(source)[1])
