"""Compiles launches for devices that are not there: Triton's own launch path, stopped before it loads the binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from attnfuse.kernels.kernel import Residual
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton import gradients
from attnfuse.kernels.triton.launch import prepare
from attnfuse.operands import Operands
from attnfuse.reference import out_dtype
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

TARGETS = {
    "cuda:sm80": GPUTarget("cuda", 80, 32),
    "cuda:sm90": GPUTarget("cuda", 90, 32),
    "cuda:sm100": GPUTarget("cuda", 100, 32),
    "rocm:gfx942": GPUTarget("hip", "gfx942", 64),
    "rocm:gfx950": GPUTarget("hip", "gfx950", 64),
    "rocm:gfx1100": GPUTarget("hip", "gfx1100", 32),
}


class Absent:
    """A driver of a device that is not there; each target is a device of its own to Triton's caches."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def absent(name: str) -> Iterator[None]:
    before = driver._active
    driver._active = Absent(name)
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: its texts by stage, and bytes of shared memory."""

    asm: dict[str, Any]
    shared: int

    def count(self, stage: str, pattern: str) -> int:
        return len(re.findall(pattern, self.asm[stage]))

    def resources(self) -> dict[str, int]:
        """Registers a thread and bytes it spills."""
        if "amdgcn" in self.asm:
            names = {"registers": r"\.vgpr_count:\s+(\d+)", "spills": r"\.vgpr_spill_count:\s+(\d+)"}
            return {name: int(re.findall(pattern, self.asm["amdgcn"])[-1]) for name, pattern in names.items()}
        return _ptxas(self.asm["ptx"])


def _ptxas(ptx: str) -> dict[str, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    (arch,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    number = int(re.findall(r"\d+", arch)[0])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(number).path, "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(folder) / "cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"registers": int(re.findall(r"Used (\d+) registers", said)[-1]), "spills": spills}


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 8
    kv_heads: int = 8
    rows: int = 1024
    keys: int = 1024
    width: int = 128
    value_width: int = 128


def operands(
    spec: AttentionSpec, sizes: Sizes, dtype: torch.dtype, value_minor: str = "d"
) -> tuple[Operands, torch.Tensor]:
    """The operands and room for out; what is in them does not matter."""

    def made(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.empty(sizes.batch, heads, length, width, dtype=dtype)

    query = made(sizes.heads, sizes.rows, sizes.width)
    key, value = (made(sizes.kv_heads, sizes.keys, width) for width in (sizes.width, sizes.value_width))
    value = value.mT.contiguous().mT if value_minor == "n" else value
    out = made(sizes.heads, sizes.rows, sizes.value_width).to(out_dtype(spec, dtype))
    extent = dict(zip(spec.axes, (*query.shape[:-1], sizes.keys), strict=True))
    captures = [
        torch.empty([extent[axis] if axis in each.axes else 1 for axis in spec.axes], dtype=getattr(torch, each.dtype))
        for each in spec.captures
    ]
    if spec.dropout:
        captures.append(torch.zeros(1, dtype=torch.int64))
    return Operands(query, key, value, tuple(captures)), out


def compiled_backward(
    monkeypatch: pytest.MonkeyPatch, target: str, spec: AttentionSpec, sizes: Sizes
) -> dict[str, Compiled]:
    """Every kernel of a backward for a target, by its function's name; a second one of that name is ``again``."""
    found: dict[str, Compiled] = {}

    def launcher(function: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **options: Any) -> None:
            made = function.warmup(*arguments, grid=grid, **options)
            name = function.__name__
            found[f"{name}, again" if name in found else name] = Compiled(made.asm, made.metadata.shared)

        return compile_it

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(gradients, "target_of", lambda device: Target.parse(target))
    given, out = operands(spec, sizes, torch.bfloat16)
    needs = [x.is_floating_point() for x in given.tensors]
    residual = Residual(out, torch.empty(out.shape[:-1]))
    with absent(target):
        gradients.Gradients(spec, out, given, needs, residual).run()
    return found


def compiled(
    target: str,
    spec: AttentionSpec,
    sizes: Sizes,
    schedule: Schedule | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    with_lse: bool = False,
    value_minor: str = "d",
) -> Compiled:
    """The forward of ``spec`` for a target, of operands of one dtype."""
    given, out = operands(spec, sizes, dtype, value_minor)
    lse = torch.empty(out.shape[:-1] if with_lse else (0,), dtype=torch.float32)
    launch = prepare(spec, given, out, lse, schedule, Target.parse(target))
    with absent(target):
        kernel = launch.body.warmup(*launch.arguments, grid=(1,), **launch.options)
    return Compiled(kernel.asm, kernel.metadata.shared)


def compiled_weights(target: str, spec: AttentionSpec, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """What writes the weights of ``spec`` for a target."""
    from attnfuse.kernels.triton.weighing import prepare_weights
    from attnfuse.kernels.triton.weights import weigh

    given, _ = operands(spec, sizes, dtype)
    out = torch.empty(*given.query.shape[:-1], sizes.keys, dtype=dtype)
    launch = prepare_weights(spec, given, out, target=Target.parse(target))
    with absent(target):
        kernel = weigh.warmup(*launch.arguments, grid=(1,), **launch.options)
    return Compiled(kernel.asm, kernel.metadata.shared)
