"""The forward body in plain Python, launched as the kernel launches it: as exact as the written-out program."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels import lookup
from attnfuse.kernels.gluon import launch, plan
from attnfuse.kernels.gluon.build import _SIZES, Programs, Source, _signature
from attnfuse.kernels.gluon.forward import attention_forward
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import SPECS as ANY
from tests.kernels.cases import Case, Sizes, assert_as_exact, case, exact, written_out
from tests.kernels.gluon import plain
from tests.kernels.gluon.test_gpu_float8 import SPECS, of

NAMES = attention_forward.arg_names
#: Two multiprocessors, so that blocks have several items.
PROCESSORS = 2


class Body:
    """Stands in for a compiled forward."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any, stream: int) -> None:
            gl = plain.language(grid[0])
            arguments = {**dict(zip(NAMES, given, strict=False)), "programs": programs(self.source, gl)}
            arguments["meta"] = self.source.meta
            for name, kind in _signature(self.source).items():
                if name.endswith("_desc") and kind != "constexpr":
                    arguments[name] = described(arguments[name], kind)
            for name in _SIZES:
                arguments[name] = plain.block(arguments[name])
            for name in ("lse", "counter"):
                arguments[name] = plain.Pointer(arguments[name].view(-1))
            arguments["captures"] = tuple(plain.Pointer(flat(x)) for x in arguments["captures"])
            plain.launch(plain.body(gl), grid[0], *(arguments[name] for name in NAMES))

        return run


def described(given: Any, kind: str) -> plain.Descriptor:
    tile = re.search(r"\[([\d, ]+)\]", kind)
    assert tile is not None
    memory = torch.as_strided(given.base, given.shape, given.strides)
    return plain.Descriptor(memory, tuple(map(int, tile.group(1).split(","))))


def flat(tensor: Tensor) -> Tensor:
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


def programs(source: Source, gl: Any) -> Programs:
    def made(text: str | None) -> Any:
        names: dict[str, Any] = {"jit": lambda function: function, "tl": gl}
        exec(text or "program = None", names)
        return names["program"]

    texts = (source.score, source.bare, source.sink, source.factor)
    return Programs(*map(made, texts), source.reads, source.bare_reads, tuple(map(made, source.loaders)))


@pytest.fixture(autouse=True)
def in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(plan, "build", Body)
    monkeypatch.setattr(plan, "_PLANS", {})
    monkeypatch.setattr(plan, "_processors", lambda device: PROCESSORS)
    monkeypatch.setattr(launch, "_counter", lambda device, stream: torch.zeros(1, dtype=torch.int32))
    driver = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setattr(launch, "triton", driver)


def float8(given: Case, dtype: torch.dtype = torch.float8_e4m3fn, minor: str = "n") -> Case:
    query, key, value = (x.to(dtype) for x in given.operands[:3])
    return replace(given, query=query, key=key, value=value.mT.contiguous().mT if minor == "n" else value)


def check(given: Case, meta: Meta | None = None) -> None:
    out, lse = launch.forward(given.spec, *given.operands[:3], given.captures, (), with_lse=True, meta=meta)
    source, true_lse = reference(given.spec, *given.operands[:3], given.captures)
    assert lse is not None
    # where the reference rounds once, a tile rounds weights, sums and the result
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, rtol=5e-3, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize("name", ["scaled", "causal", "window", "sink", "alibi", "causal, rows without keys"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_half_types(name: str, width: int) -> None:
    given = case(ANY[name], Sizes((2,), 2, 1, 200, 300, width, width), torch.bfloat16)
    out, _ = lookup("gluon").run_with_lse(given.spec, *given.operands[:3], given.captures, ())
    assert_as_exact([out], [written_out(given)], [exact(given)])


def test_factors_of_rows() -> None:
    given = case(SPECS["factor of each row"], Sizes((2,), 2, 1, 100, 150, 64, 64), torch.float16)
    out, _ = lookup("gluon").run_with_lse(given.spec, *given.operands[:3], given.captures, ())
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
