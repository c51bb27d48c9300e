"""What compilers make of the bodies, without a GPU: tensor cores, copies, waits and registers as designed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from attnfuse.kernels.gluon.tuned import tuned
from attnfuse.kernels.triton import function_text
from attnfuse.score import parse
from attnfuse.spec import Captured

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.meta import Meta

#: Every body that is used without a program: by head's width, for 4096 keys and for many.
BODIES = {
    f"{width}, {keys} keys{', causal' if right else ''}": tuned(
        width, width, keys, left=False, right=right, program=False
    ).having(right=right)
    for width, keys, right in (
        (64, 4096, False), (64, 4096, True), (128, 4096, False), (128, 4096, True), (128, 16384, True),
        (256, 4096, False), (256, 4096, True),
    )
}  # fmt: skip
SLOPES, IDS = Captured(("h",), "float32"), (Captured(("b0", "m"), "int32"), Captured(("b0", "n"), "int32"))


@cache
def compiled(source: Source) -> tuple[str, str]:
    """The PTX, and what ptxas says of it."""
    ptx = str(build(source).asm["ptx"])
    return ptx, _assembled(ptx)


def _assembled(ptx: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas  # type: ignore[import-not-found,unused-ignore]

    ptxas = str(get_ptxas(90).path)
    command = [ptxas, "-v", "-arch=sm_90a", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


def waits(ptx: str) -> list[str]:
    """In program order: products started, waits by how many may stay in flight, exponents."""
    found = re.findall(r"wgmma\.commit_group|wgmma\.wait_group\.sync\.aligned (\d)|(ex2\.approx)", ptx)
    order = ["exp" if exp else f"wait {depth}" if depth else "product" for depth, exp in found]
    return [each for place, each in enumerate(order) if place == 0 or each != "exp" or order[place - 1] != "exp"]


@pytest.mark.parametrize("name", BODIES)
def test_registers_suffice(name: str) -> None:
    _, report = compiled(Source(BODIES[name], "bf16"))
    spilled = re.search(r"(\d+) bytes spill stores", report)
    # the three consumers of 128 wide heads keep one descriptor in memory
    assert spilled is not None
    assert int(spilled.group(1)) <= 8
    assert "serialized" not in report
    assert "setmaxnreg" not in report


@pytest.mark.parametrize("name", BODIES)
def test_products_and_copies(name: str) -> None:
    meta = BODIES[name]
    ptx, _ = compiled(Source(meta, "bf16"))
    in_qk, in_pv = meta.head_block // 16, meta.block_n // 16
    # overlapped: scores of the first tile, of the next, and the outputs beside and after them
    products = (2 if meta.overlapped else 1) * (in_qk + in_pv)
    assert ptx.count("wgmma.mma_async") == meta.consumers * products
    assert ptx.count("setmaxnreg") > 0
    # rows of 128 bytes, one copy each: Q of every consumer, K, V
    loads = (meta.head_block // 64) * (meta.consumers + 1) + meta.value_block // 64
    assert ptx.count("cp.async.bulk.tensor.4d.shared") == loads
    assert ptx.count("cp.async.bulk.tensor.4d.global") >= meta.consumers


@pytest.mark.parametrize("name", BODIES)
def test_softmax_runs_beside_a_product(name: str) -> None:
    # a mask's branch is laid out away from its loop
    meta = BODIES[name].having(right=False)
    order = waits(compiled(Source(meta, "bf16"))[0])
    if meta.overlapped:
        loop = ["product", "product", "wait 1", "exp", "wait 0"]
        assert sum(order[place : place + len(loop)] == loop for place in range(len(order))) == meta.consumers
    else:
        assert "wait 1" not in order


def test_exponents_stay_ahead_of_the_wait(tmp_path: Path) -> None:
    """ptxas moves the wait up unless a basic block ends before it (``Meta.held``)."""
    held = replace(Meta(128, 128), right=True)
    for meta, ahead in ((held, True), (replace(held, held=False), False)):
        cubin = tmp_path / "forward.cubin"
        kernel: Any = build(Source(meta, "bf16"))
        cubin.write_bytes(kernel.asm["cubin"])
        assert (_exponents_between_waits(cubin) >= 64) is ahead


def _exponents_between_waits(cubin: Path) -> int:
    """The most MUFU.EX2 between a wait that leaves one product in flight and the next wait."""
    from triton import knobs

    lines = subprocess.run(
        [str(knobs.nvidia.nvdisasm.path), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    most, count, counting = 0, 0, False
    for line in lines:
        if "WARPGROUP.DEPBAR" in line:
            most = max(most, count if counting else 0)
            counting, count = "0x1" in line, 0
        count += "MUFU.EX2" in line
    return most


@pytest.mark.parametrize(
    ("text", "captures", "kinds", "strides"),
    [
        ("tanh(0.01 * s)", (), (), ()),
        ("s + t0 * (n - m)", (SLOPES,), ("fp32",), ("constexpr",)),
        ("where(t0 == t1, s, -inf)", IDS, ("i32", "i32"), ("i32", "constexpr", "i32", "constexpr")),
    ],
)
def test_programs_compile(
    text: str, captures: tuple[Captured, ...], kinds: tuple[str, ...], strides: tuple[str, ...]
) -> None:
    meta = tuned(128, 128, 4096, left=False, right=True, program=True).having(right=True, ragged=True, lse=True)
    program = function_text(parse(text), captures, fast=True)
    ptx, report = compiled(Source(meta, "bf16", program, None, kinds, strides))
    assert "serialized" not in report
    assert ("tanh.approx" in ptx) is ("tanh" in text)


def test_a_window_a_sink_and_fp16_compile() -> None:
    sink = function_text(parse("2.0 * t0"), (Captured(("h",), "float16"),))
    meta = tuned(96, 80, 4096, left=True, right=True, program=True).having(left=True, right=True)
    _, report = compiled(Source(meta, "fp16", None, sink, ("fp16",), ("constexpr",)))
    assert " 0 bytes spill stores" in report
