"""The forward body in plain Python, launched as the kernel launches it: as exact as the written-out program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels import lookup
from attnfuse.kernels.gluon import forward, launch, plan
from attnfuse.kernels.gluon.build import _SIZES, Programs, Source, _signature
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import SPECS as ANY
from tests.kernels.cases import Case, Sizes, assert_as_exact, case, exact, written_out
from tests.kernels.gluon import plain
from tests.kernels.gluon.plain_launch import DRIVER, arguments, function, pointer
from tests.kernels.gluon.test_gpu_float8 import SPECS, of

NAMES = forward.attention_forward.arg_names
#: Two multiprocessors, so that blocks have several items.
PROCESSORS = 2


class Body:
    """Stands in for a compiled forward."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any, stream: int) -> None:
            gl = plain.language(grid[0])
            named = dict(zip(NAMES, given, strict=False))
            found = arguments(named, _signature(self.source), _SIZES)
            found |= {name: pointer(named[name]) for name in ("lse", "counter")}
            found |= {"programs": programs(self.source, gl), "meta": self.source.meta}
            body = plain.spoken(forward, gl)["attention_forward"]
            plain.launch(body, grid[0], *(found[name] for name in NAMES))

        return run


def programs(source: Source, gl: Any) -> Programs:
    made = function(gl)
    texts = (source.score, source.bare, source.sink, source.factor)
    return Programs(*map(made, texts), source.reads, source.bare_reads, tuple(map(made, source.loaders)))


@pytest.fixture(autouse=True)
def in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "build", Body)
    monkeypatch.setattr(plan, "_PLANS", {})
    monkeypatch.setattr(plan, "_processors", lambda device: PROCESSORS)
    monkeypatch.setattr(launch, "_counter", lambda device, stream: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(launch, "triton", DRIVER)


def float8(given: Case, dtype: torch.dtype = torch.float8_e4m3fn, minor: str = "n") -> Case:
    query, key, value = (x.to(dtype) for x in given.tensors[:3])
    return replace(given, query=query, key=key, value=value.mT.contiguous().mT if minor == "n" else value)


def check(given: Case, meta: Meta | None = None) -> None:
    out, lse = launch.forward(given.spec, given.operands, with_lse=True, meta=meta)
    source, true_lse = reference(given.spec, given.operands)
    assert lse is not None
    # where the reference rounds once, a tile rounds weights, sums and the result
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, rtol=5e-3, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize("name", ["scaled", "causal", "window", "sink", "alibi", "causal, rows without keys"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_half_types(name: str, width: int) -> None:
    given = case(ANY[name], Sizes((2,), 2, 1, 200, 300, width, width), torch.bfloat16)
    out, _ = lookup("gluon").run_with_lse(given.spec, given.operands)
    assert_as_exact([out], [written_out(given)], [exact(given)])


@pytest.mark.parametrize("width", [64, 256])
def test_factors_of_rows(width: int) -> None:
    given = case(SPECS["factor of each row"], Sizes((2,), 2, 1, 100, 150, width, width), torch.float16)
    out, _ = lookup("gluon").run_with_lse(given.spec, given.operands)
    assert_as_exact([out], [written_out(given)], [exact(given)])


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"documents"}))
def test_float8(name: str) -> None:
    check(float8(case(of(name, "float8_e4m3fn"), Sizes((2,), 2, 1, 200, 301, 128, 128), torch.float32)))


@pytest.mark.parametrize("minor", ["d", "n"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (128, 64), (96, 80)])
def test_widths_and_types_of_float8(widths: tuple[int, int], dtype: str, minor: str) -> None:
    given = case(of("scale of each head", dtype), Sizes((1,), 2, 2, 70, 260, *widths), torch.float32)
    check(float8(given, getattr(torch, dtype), minor))


#: Choices beside the table's.
METAS = {
    "in turn": Meta(128, 128, overlapped=False),
    "three": Meta(128, 128, consumers=3, registers=160, overlapped=False, partial_sums=True, turns=True),
    "turns, held": Meta(128, 128, turns=True, own=True),
    "64 keys": Meta(128, 128, block_n=64, stages=4, own=True, queries=2),
    "256 keys": Meta(128, 128, block_n=256, overlapped=False),
}


@pytest.mark.parametrize("name", ["scaled", "causal"])
@pytest.mark.parametrize("choice", METAS)
def test_any_choice(choice: str, name: str) -> None:
    given: AttentionSpec = of(name, "float8_e4m3fn")
    check(float8(case(given, Sizes((1,), 2, 1, 400, 520, 128, 128), torch.float32)), METAS[choice])
