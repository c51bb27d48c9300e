"""What compilers make of the bodies, without a GPU: tensor cores, copies, waits and registers as designed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from attnfuse.kernels.gluon.tuned import tuned
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import spec as _spec

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.plan import listing_of, sourced
from attnfuse.kernels.triton.tiles import list_tiles
from tests.kernels.triton.offline import _ptxas, absent

#: Every body that is used without a program: by head's width and keys.
BODIES = {
    f"{width}, {keys} keys{', causal' if right else ''}": tuned(
        width, width, keys, left=False, right=right, program=False
    ).having(right=right)
    for width, keys, right in (
        (64, 4096, False), (64, 4096, True), (64, 8192, True), (128, 512, True), (128, 1024, False), (128, 4096, False),
        (128, 4096, True), (128, 8192, True), (256, 4096, True),
    )
}  # fmt: skip


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
    # the three consumers of 128 wide heads keep a few numbers of an item in memory: 16 bytes by Triton 3.6, 32 by 3.7
    assert spilled is not None
    assert int(spilled.group(1)) <= (32 if _is_full(BODIES[name]) else 0)
    assert "serialized" not in report
    assert "setmaxnreg" not in report


def _is_full(meta: Meta) -> bool:
    """Whether consumers have no register to spare."""
    return meta.consumers == 3 and meta.head_block == 128


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
        assert (exponents_between_waits(cubin) >= 64) is ahead


def disassembled(cubin: Path) -> list[str]:
    """The machine code, a line an instruction."""
    from triton import knobs

    command = [str(knobs.nvidia.nvdisasm.path), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_partitions_are_told_their_number_behind_a_barrier_of_all() -> None:
    """``racecheck`` reports these writes and reads, one pair a launch: it does not count Triton's barrier of all.

    Here it is: each write is followed by it, each read comes after it, and between the two writes partitions end at it.
    """
    ptx, _ = compiled(Source(BODIES["128, 4096 keys, causal"], "bf16"))
    kinds = {
        "write": r"st\.shared\.v2\.b32\s+\[global_smem\+\d+\], \{\d+, \d+\};", "read": r"ld\.shared\.b8 ",
        "barrier": r"barrier\.sync\s+1;",
    }  # fmt: skip
    found = re.finditer("|".join(f"(?P<{kind}>{text})" for kind, text in kinds.items()), ptx)
    order = [match.lastgroup for match in found]
    writes = [place for place, kind in enumerate(order) if kind == "write"]
    assert len(writes) == 2
    assert order.count("read") == 1
    assert all(order[place + 1] == "barrier" for place in writes)
    assert order[writes[1] - 1] == "barrier"
    assert order[order.index("read") - 1] == "barrier"


def exponents_between_waits(cubin: Path) -> int:
    """The most MUFU.EX2 between a wait that leaves one product in flight and the next wait."""
    most, count, counting = 0, 0, False
    for line in disassembled(cubin):
        if "WARPGROUP.DEPBAR" in line:
            most = max(most, count if counting else 0)
            counting, count = "0x1" in line, 0
        count += "MUFU.EX2" in line
    return most


PROGRAMS = {
    "softcap": _spec("where(n <= m, 50.0 * tanh(0.1 * s / 50.0), -inf)"),
    "slopes": _spec("where(n <= m, 0.1 * s + t0 * (n - m), -inf)", "float32[h]"),
    "bias": _spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]"),
    "float32 bias of a batch": _spec("0.1 * s + t0", "float32[b0,m,n]"),
    "documents": _spec("where(t0 == t1, 0.1 * s, -inf)", "int64[b0,m]", "int64[b0,n]"),
    "sinks": _spec("where((n <= m) & (n >= m - 100), 0.1 * s, -inf)", "float16[h]", sink="2.0 * t0"),
}
#: Bytes. A tile's document ids of 64 bits take 64 registers of a thread, and some are spilled.
SPILLED = {"documents": 192, "bias": 8, "float32 bias of a batch": 8}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_compile(name: str) -> None:
    query = torch.empty(2, 4, 1000, 128, dtype=torch.bfloat16, device="meta")
    operands = (query, query, query, *_captures(PROGRAMS[name]))
    facts = tuple((x.shape, x.stride(), x.dtype) for x in operands)
    source, *_ = sourced(PROGRAMS[name], facts, (), with_lse=True)
    ptx, report = compiled(source)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert spilled is not None
    assert int(spilled.group(1)) <= SPILLED.get(name, 0)
    assert "serialized" not in report
    assert ("tanh.approx" in ptx) is (name == "softcap")
    copies = ptx.count("cp.async.bulk.tensor.4d.shared")
    # Q of two consumers, K and V, two boxes each; a bias arrives by the copy engine too
    assert (copies > 8) is ("bias" in name)


def _captures(spec: AttentionSpec, length: int = 1000) -> list[torch.Tensor]:
    sizes = {"b0": 2, "h": 4, "m": length, "n": length}
    shapes = [[sizes[axis] if axis in each.axes else 1 for axis in spec.axes] for each in spec.captures]
    types = [getattr(torch, each.dtype) for each in spec.captures]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, types, strict=True)]


@pytest.mark.parametrize("name", ["documents", "blocks"])
def test_listed_programs_read_the_mask_in_cut_tiles_alone(name: str) -> None:
    """The loop over tiles has two programs, and one launch before it lists the tiles."""
    masks = {"documents": PROGRAMS["documents"], "blocks": _spec("where((n <= m) & t0, 0.1 * s, -inf)", "bool[b0,m,n]")}
    query = torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta")
    captures = _captures(masks[name], 2048)
    facts = tuple((x.shape, x.stride(), x.dtype) for x in (query, query, query, *captures))
    source, programs = sourced(masks[name], facts, (), with_lse=False)
    assert source.meta.listed
    assert source.score is not None
    assert source.bare is None
    assert set(source.bare_reads) == {""}
    _, report = compiled(source)
    assert "serialized" not in report
    listing = listing_of(masks[name], facts, (), source.meta, programs)
    assert listing is not None
    assert listing.mask.ranged is (name == "documents")
    lists = torch.empty(16, dtype=torch.int32)
    given = [torch.empty(16, dtype=each.dtype) for each in captures]
    scope = (tuple(given), listing.strides, ())
    sizes = (listing.rows, listing.keys, *listing.band, listing.length)
    with absent("cuda:sm90"):
        kernel = list_tiles.warmup(lists, lists, lists, scope, listing.heads, sizes, listing.mask, grid=(1, 1, 1))
    assert _ptxas(kernel.asm["ptx"])["spills"] == 0
