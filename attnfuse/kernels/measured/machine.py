"""The device that measurements are of, what else they depend on, and the file that they are kept in."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from attnfuse.cache import folder
from attnfuse.kernels.cpu.calibrate import processor
from attnfuse.kernels.registry import registered
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = ["machine", "place", "present"]


def place(target: Target) -> Path | None:
    """The file of a target; None where it is no device of this machine."""
    known = machine(target)
    if known is None:
        return None
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    device = "".join(letter if letter.isalnum() else "-" for letter in known["device"])
    return folder() / f"tuned-{device}-{key}.json"


def present(target: Target) -> bool:
    """Whether a target is a device of this machine."""
    return _device(target) is not None


def machine(target: Target) -> dict[str, str] | None:
    """All that a measurement depends on beside its case; None for a target that is no device of this machine."""
    device = _device(target)
    if device is None:
        return None
    return {
        "device": device,
        "target": str(target),
        "threads": str(torch.get_num_threads()) if target.kind == "cpu" else "",
        "attnfuse": __version__,
        "torch": str(torch.__version__),
        "triton": _triton(),
        "kernels": registered(),
    }


def _device(target: Target) -> str | None:
    if target.kind == "cpu":
        return processor()
    if target != Target.current():
        return None
    name: str = torch.xpu.get_device_name() if target.kind == "xpu" else torch.cuda.get_device_name()
    return name


@lru_cache(maxsize=1)
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
