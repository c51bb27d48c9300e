"""flex_attention as a kernel: its blocks, what it refuses, and what becomes of it in a graph that Inductor compiles."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from attnfuse import fuse_graph
from attnfuse.graph.capture import capture
from attnfuse.graph.text import render
from attnfuse.kernels import Operand, Problem, choose, lookup
from attnfuse.kernels.cpu import cost, flex
from attnfuse.kernels.cpu.blockmask import BLOCK, block_mask
from attnfuse.kernels.cpu.calibrate import Speed
from attnfuse.kernels.rows import Band
from attnfuse.target import Target
from tests.kernels.cases import SIZES, SPECS, assert_as_exact, case, exact, spec, written_out
from tests.kernels.test_registry import problem

CPU = Target("cpu")
#: Where flex_attention cannot be compiled there is nothing of a graph to see.
compiling = pytest.mark.skipif(bool(flex._cannot_compile()), reason="; ".join(flex._cannot_compile()))
BANDS = (
    Band(),
    Band(right=0),
    Band(right=-130),
    Band(-200, 40),
    Band(-5, 3, exact=False),
    Band(left=100),
    Band(900, 950),
)


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (256, 512), (70, 900), (700, 90)])
def test_blocks_hold_the_band_and_full_ones_lie_inside(band: Band, rows: int, keys: int) -> None:
    mask = block_mask(band, torch.empty(1, 1, rows, 1), keys, lambda b, h, m, n: n <= m)
    row, key = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    inside = (key >= row + (-keys - rows if band.left is None else band.left)) & (
        key <= row + (keys + rows if band.right is None else band.right)
    )
    partial = _covered(mask.kv_num_blocks, mask.kv_indices, rows, keys)
    full = _covered(mask.full_kv_num_blocks, mask.full_kv_indices, rows, keys)
    assert not (partial & full).any()
    assert not (inside & ~(partial | full)).any()
    assert inside[full].all()
    if not band.exact:
        assert not full.any()
    elif rows == keys == 300 and band == Band(right=0):
        # what create_block_mask would find, and the short block at the end is no exception
        assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1]
        assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2]


def _covered(numbers: Tensor | None, indices: Tensor | None, rows: int, keys: int) -> Tensor:
    """Which scores lie in the listed blocks; a block listed twice is an error."""
    assert numbers is not None
    assert indices is not None
    found = torch.zeros(rows, keys, dtype=torch.bool)
    for at in range(math.ceil(rows / BLOCK)):
        listed = indices[0, 0, at, : numbers[0, 0, at]].tolist()
        assert len(set(listed)) == len(listed)
        for block in listed:
            found[at * BLOCK : (at + 1) * BLOCK, block * BLOCK : (block + 1) * BLOCK] = True
    return found


REFUSED: dict[str, tuple[Callable[[Problem], Problem], str]] = {
    "not compiled": (lambda asked: replace(asked, compiled=False), "dense where nothing compiles it"),
    "dynamic": (lambda asked: replace(asked, dynamic=True), "here one is symbolic"),
    "training": (lambda asked: replace(asked, query=replace(asked.query, requires_grad=True)), "has no backward"),
    "float64": (lambda asked: replace(asked, query=replace(asked.query, dtype=torch.float64)), "one dtype"),
    "decoding": (lambda asked: replace(asked, query=Operand((1, 8, 1, 64), torch.float32)), "one query row"),
    "no keys": (lambda asked: replace(asked, key=Operand((1, 8, 0, 64), torch.float32)), "at least one"),
    "empty rows": (lambda _: problem("causal, rows without keys"), "cannot be ruled out"),
    "sinks": (lambda _: problem("sink"), "no sinks"),
    "weights": (lambda _: problem("weights squared"), "no weight program"),
    "dropout": (lambda _: problem("dropout"), "no dropout"),
    "bias": (lambda _: problem("bias"), "would be copied"),
}


@compiling
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences_about_the_problem(name: str) -> None:
    change, words = REFUSED[name]
    assert not lookup("flex").refuses(problem("causal"), CPU)
    reasons = lookup("flex").refuses(change(problem("causal")), CPU)
    assert any(words in reason for reason in reasons), reasons


@compiling
def test_a_machine_that_cannot_compile_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    flex._cannot_compile.cache_clear()
    try:
        assert lookup("flex").refuses(problem("causal"), CPU) == (
            "Inductor compiles it for x86 CPUs with AVX2 or more, not for this one",
        )
    finally:
        flex._cannot_compile.cache_clear()
    with torch._dynamo.config.patch(disable=True):
        assert lookup("flex").refuses(problem("causal"), CPU) == ("torch.compile is switched off",)


def test_autocast_is_refused() -> None:
    assert "fails in Inductor under autocast" in lookup("flex").refuses(replace(problem("causal"), autocast=True), CPU)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_seen_in_a_graph_and_around_it(inside: bool) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.softmax(query @ key.mT, dim=-1) @ value

    seen: list[bool] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(capture(graph).casts)
        return graph.forward

    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        torch.compile(attention, backend=backend, fullgraph=True)(*(torch.randn(1, 2, 8, 4) for _ in range(3)))
    assert seen == [True]


@compiling
def test_fast_numerics_let_empty_rows_be_zero() -> None:
    padded = problem("padding")
    assert lookup("flex").refuses(padded, CPU)
    assert not lookup("flex").refuses(replace(padded, numerics="fast"), CPU)


@pytest.mark.parametrize("slope", [float("-inf"), float("inf"), float("nan")])
def test_a_slope_that_is_not_finite_makes_its_rows_nan_as_in_the_source(slope: float) -> None:
    given = case(SPECS["alibi"], SIZES["odd"], torch.float32)
    given.captures[0][:, 1] = slope
    out = lookup("flex").run(given.spec, given.operands)
    assert torch.equal(out.isnan(), written_out(given).isnan())
    assert out[:, 1].isnan().all()
    assert not out[:, 0].isnan().any()


@compiling
class TestTheGate:
    """Chosen where it was measured to be faster: float32 programs that products do not dominate."""

    def test_a_float32_softcap_is_its_own(self) -> None:
        assert choose(problem("softcap, causal"), CPU).kernel == "flex"

    def test_bfloat16_is_its_own_where_tiles_make_flash_attention_fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cost, "speed", lambda dtype: Speed(product=0.0100, flash=0.0050))
        assert choose(problem("alibi", rows=512, keys=512, dtype=torch.bfloat16), CPU).kernel == "flex"

    @pytest.mark.parametrize("name", ["scaled", "causal"])
    def test_what_sdpa_computes_is_left_to_sdpa(self, name: str) -> None:
        assert choose(problem(name), CPU).kernel == "sdpa"

    def test_bfloat16_without_tiles_is_left_to_blocks(self) -> None:
        assert choose(problem("alibi", dtype=torch.bfloat16), CPU).kernel == "blocked"

    def test_few_keys_are_not_worth_compiling(self) -> None:
        assert choose(problem("alibi", rows=64, keys=64), CPU).kernel != "flex"


def site(qkv: Tensor) -> Tensor:
    """ALiBi in a window on the parts of one projection, with slopes that the graph computes, and a sum behind it."""
    query, key, value = qkv.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind()
    place = torch.arange(qkv.shape[1])
    slopes = 2.0 ** -torch.arange(1.0, 5.0)
    distance = place[None, :] - place[:, None]
    scores = query @ key.mT * 0.25 + slopes[:, None, None] * distance
    scores = scores.masked_fill((distance > 0) | (distance <= -150), float("-inf"))
    return torch.softmax(scores, dim=-1) @ value + 1.0


@compiling
def test_in_a_graph_that_inductor_compiles() -> None:
    torch.compiler.reset()
    given = torch.randn(2, 301, 192)
    run = torch.compile(site, backend="attnfuse", fullgraph=True, options={"kernel": "flex", "profit": False})
    with torch.no_grad():
        assert_as_exact([run(given)], [site(given)], [site(given.double())])


@compiling
def test_the_graph_holds_the_operator_and_its_programs(golden: Callable[[str, str], None]) -> None:
    """Read ``tests/golden/flex.txt``: one call, the blocks and the slopes before it, two small programs."""
    seen: list[str] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        fused = fuse_graph(graph, inputs, kernel="flex", profit=False)
        seen.append(render(fused))
        return fused.forward

    def alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        place = torch.arange(query.shape[2])
        scores = query @ key.mT * 0.25 + slopes[:, None, None] * (place[None, :] - place[:, None])
        return torch.softmax(scores.masked_fill(place[None, :] > place[:, None], float("-inf")), dim=-1) @ value

    torch.compiler.reset()
    given = (*torch.randn(3, 2, 4, 140, 16).unbind(), torch.rand(4))
    with torch.no_grad():
        found = torch.compile(alibi, backend=backend, fullgraph=True)(*given)
        assert_as_exact([found], [alibi(*given)], [alibi(*(x.double() for x in given))])
    # how many fields of a block mask are empty depends on torch's version
    golden(re.sub(r"(None, )+", "", seen[0]), "flex")


def test_a_capture_that_score_and_mask_share() -> None:
    shared = spec("where(t0 > 0.0, 0.3 * s + 0.1 * t0, -inf)", "float32[b0,n]", empty_rows="zero")
    given = case(shared, SIZES["odd"], torch.float32)
    out = lookup("flex").run(given.spec, given.operands)
    assert_as_exact([out], [written_out(given)], [exact(given)])
