"""Where a program will run: a device kind and, for GPUs, an architecture. A target need not be present."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnfuse.errors import BadInput

__all__ = ["KINDS", "Target"]

#: Device kinds in the order `attnfuse kernels` lists them.
KINDS = ("cpu", "cuda", "rocm", "xpu")


@dataclass(frozen=True)
class Target:
    """``kind`` is one of :data:`KINDS`; ``arch`` is ``sm90``, ``gfx942``, ``pvc``... or empty for any."""

    kind: str
    arch: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind

    @staticmethod
    def parse(source: str) -> Target:
        """``"cpu"``, ``"cuda:sm90"``, ``"rocm:gfx942"``, ``"xpu:pvc"``. Raises :class:`BadInput`."""
        kind, _, arch = source.partition(":")
        if kind not in KINDS:
            raise BadInput(f"unknown target {source!r}; a target is one of {', '.join(KINDS)}, with an optional :arch")
        if kind == "cpu" and arch:
            raise BadInput(f"unknown target {source!r}; cpu takes no architecture")
        return Target(kind, arch)

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target that a tensor's device is."""
        if device.type == "cuda" and torch.version.hip:
            return Target("rocm", _hip_arch(device) if torch.cuda.is_available() else "")
        if device.type == "cuda":
            return Target("cuda", _cuda_arch(device) if torch.cuda.is_available() else "")
        if device.type == "xpu":
            return Target("xpu")
        if device.type in ("cpu", "meta"):
            return Target("cpu")
        raise BadInput(f"attnfuse has no kernels for device type {device.type!r}")

    @staticmethod
    def current() -> Target:
        """The best device of this machine."""
        if torch.cuda.is_available():
            return Target.of(torch.device("cuda", torch.cuda.current_device()))
        if torch.xpu.is_available():
            return Target("xpu")
        return Target("cpu")


def _cuda_arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _hip_arch(device: torch.device) -> str:
    name: str = torch.cuda.get_device_properties(device).gcnArchName
    return name.partition(":")[0]
