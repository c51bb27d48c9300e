"""How fast this CPU multiplies and how fast ATen's flash attention runs on it, measured once and kept on disk.

The two differ between CPUs by more than anything else in the cost model: with AMX, bfloat16 flash attention is twice
as fast as blocks of products, without it slower. A measurement takes a few milliseconds for each dtype. It is kept
in :func:`attnfuse.cache.folder` for each CPU, thread count and torch version; a file that cannot be read or written
only means that it is measured again. ``ATTNFUSE_CALIBRATE=0`` leaves it to the shipped rates, so that what is chosen
does not depend on the machine.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes  # torch offers no public way to leave all modes

from attnfuse.atomic import replacing
from attnfuse.cache import believed, folder
from attnfuse.errors import BadInput
from attnfuse.reference import name_of

__all__ = ["Speed", "processor", "speed"]

log = logging.getLogger(__name__)

_HEADS, _LENGTH, _SIZE, _RUNS = 8, 512, 64, 7


@dataclass(frozen=True)
class Speed:
    """Nanoseconds of one core for each score and element of query or value: in products, and in flash attention."""

    product: float
    flash: float


@lru_cache
def speed(dtype: torch.dtype) -> Speed | None:
    """Speed of the machine in a floating-point dtype; None where it is not to be measured."""
    if not believed():
        return None
    name, path = name_of(dtype), _path()
    known = _read(path)
    if name not in known:
        known[name] = _measured(dtype)
        _write(path, known)
    return known[name]


def _measured(dtype: torch.dtype) -> Speed:
    with _disable_current_modes(), torch.inference_mode():
        query = torch.randn(1, _HEADS, _LENGTH, _SIZE, device="cpu").to(dtype)
        rows = query[0]
        product = _least(lambda: torch.bmm(torch.bmm(rows, rows.transpose(-1, -2)), rows))
        flash = _least(lambda: F.scaled_dot_product_attention(query, query, query))
    work = _HEADS * _LENGTH * _LENGTH * 2 * _SIZE / torch.get_num_threads()
    return Speed(product * 1e9 / work, flash * 1e9 / work)


def _least(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    call()
    times: list[float] = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _path() -> Path:
    return folder() / f"cpu-{processor()}-{torch.get_num_threads()}-torch{torch.__version__}.json"


def processor() -> str:
    """The CPU of this machine, its instructions as torch uses them included."""
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-{_model()}"


@lru_cache
def _model() -> str:
    """The CPU's model, as letters and digits; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return "".join(letter for letter in name if letter.isalnum())


def _read(path: Path) -> dict[str, Speed]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {name: Speed(float(each["product"]), float(each["flash"])) for name, each in raw.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(path: Path, known: dict[str, Speed]) -> None:
    """Whole or not at all, so that other processes never read half a file."""
    text = json.dumps({name: vars(each) for name, each in known.items()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except (BadInput, OSError) as error:
        log.debug("the calibration is not kept: %s", error)
