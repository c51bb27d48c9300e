"""Measures what layouts cost on a device: bandwidths of copies, and kernels with operands whose rows are contiguous.

The result is the table that the cost model reads: see :mod:`attnfuse.kernels.prices`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table as Rows
from torch import Tensor
from torch.utils.benchmark import Timer

from attnfuse.atomic import replacing
from attnfuse.kernels import Kernel, Operand, Problem, kernels
from attnfuse.kernels.prices import Table, measured_path
from attnfuse.operands import Operands
from attnfuse.reference import name_of
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from benchmark.table import machine

__all__ = ["LAYOUT_DEVICES", "as_rows", "measure_layouts", "write"]

_OPERANDS = ("query", "key", "value")
#: Of float8 both products, the weights rounded.
_FLOAT8 = AttentionSpec(weight_dtype="float8_e4m3fn", out_dtype="bfloat16")
_SPECS = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), AttentionSpec()),
    torch.float8_e4m3fn: _FLOAT8,
}
_COPIED = (torch.int8, torch.bfloat16, torch.float32, torch.float64)
#: Batch, heads, keys, head size of attention.
_SIZES = {"cpu": (1, 8, 512, 64), "cuda": (8, 16, 8192, 128), "xpu": (4, 16, 4096, 128)}
LAYOUT_DEVICES = tuple(_SIZES)
_QUICK = (1, 2, 128, 32)
#: How many times as many keys are copied, so that no cache holds them.
_LONGER = {"cpu": 32, "cuda": 1, "xpu": 1}
#: A ratio nearer to one than this is noise.
_NOISE = 0.1


def measure_layouts(device: str, *, quick: bool) -> Table:
    """The table of the device that torch calls so. Operands have ``[*B, H, N, D]``, each turned alone."""
    target = Target.of(torch.device(device))
    sizes = _QUICK if quick else _SIZES[device]
    batch, heads, keys, size = sizes
    copied = (batch, heads, keys if quick else keys * _LONGER[device], size)
    with torch.inference_mode():
        # in a graph that is compiled, so are copies
        turn = _turned if device == "cpu" else torch.compile(_turned, dynamic=False)
        copy = {str(dtype.itemsize): _bandwidth(_made(device, copied, dtype), turn) for dtype in _COPIED}
        stream = _bandwidth(_made(device, copied, torch.float32), torch.clone)
        timed = {name: _factors(kernel, target, device, sizes) for name, kernel in kernels().items()}
        factors = {name: found for name, found in timed.items() if found}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    source = f"measured by scripts/bench.py --layouts: {name}, {machine()}, {list(sizes)}"
    return Table(str(target), source, stream, copy, factors)


def _made(device: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As a projection leaves it: heads side by side."""
    batch, heads, keys, size = sizes
    return torch.randn(batch, keys, heads, size, device=device).to(dtype).transpose(1, 2)


def _turned(tensor: Tensor) -> Tensor:
    """The same values, rows contiguous."""
    return tensor.mT.contiguous().mT


def _bandwidth(tensor: Tensor, copy: Callable[[Tensor], Tensor]) -> float:
    return 2 * tensor.numel() * tensor.element_size() / _seconds(lambda: copy(tensor))


def _factors(kernel: Kernel, target: Target, device: str, sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """By dtype and operand, where a kernel notices the layout at all."""
    found: dict[str, dict[str, float]] = {}
    for dtype, spec in _SPECS.items():
        operand = Operand(sizes, dtype)
        # kernels run here on their own, and not in a graph that is compiled
        problem = Problem(spec, operand, operand, operand, rows_kept=True, compiled=False)
        if target.kind in kernel.devices and not kernel.refuses(problem, target):
            ratios = _ratios(kernel, [_made(device, sizes, dtype) for _ in _OPERANDS], problem.spec)
            noticed = {name: round(ratio, 2) for name, ratio in ratios.items() if abs(ratio - 1) > _NOISE}
            found |= {name_of(dtype): noticed} if noticed else {}
    return found


def _ratios(kernel: Kernel, operands: list[Tensor], spec: AttentionSpec) -> dict[str, float]:
    """The time with each operand turned, over that with none turned."""
    turned = ([_turned(x) if place == at else x for place, x in enumerate(operands)] for at in range(len(operands)))
    variants = [operands, *turned]

    def timed(given: list[Tensor]) -> float:
        query, key, value = given
        return _seconds(lambda: kernel.run(spec, Operands(query, key, value)))

    # in turn, so that a machine that slows down slows all
    rounds = [[timed(given) for given in variants] for _ in range(3)]
    straight, *others = (min(times) for times in zip(*rounds, strict=True))
    return dict(zip(_OPERANDS, (seconds / straight for seconds in others), strict=True))


def _seconds(call: Callable[[], object]) -> float:
    """The time of the fastest of some calls, the device waited for."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return min(timer.timeit(1).median for _ in range(3))


def as_rows(table: Table) -> Rows:
    """One line a kernel and dtype."""
    rows = Rows(title=f"time with rows contiguous over time with columns contiguous; {table.source}")
    for heading in ("kernel", "dtype", *_OPERANDS):
        rows.add_column(heading)
    for kernel, by_dtype in table.factors.items():
        for dtype, found in by_dtype.items():
            rows.add_row(kernel, dtype, *(f"{found.get(name, 1.0):.2f}" for name in _OPERANDS))
    rows.caption = f"stream {table.stream / 1e9:.1f} GB/s; transposing copies, by bytes of an element: " + ", ".join(
        f"{width}: {found / 1e9:.1f} GB/s" for width, found in table.copy.items()
    )
    return rows


def write(table: Table, path: Path | None) -> Path:
    """Writes a table where the cost model looks for what was measured, or to ``path``; returns where."""
    place = path or measured_path(Target.parse(table.target))
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as file:
        file.write((json.dumps(asdict(table), indent=1) + "\n").encode())
    return place
