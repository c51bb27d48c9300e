"""Stands in for what compiles and launches a body: runs it by :mod:`tests.kernels.gluon.plain`, as it is launched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon.plain_memory import Descriptor, Pointer, block

__all__ = ["DRIVER", "arguments", "function", "pointer"]

#: Instead of ``triton``, of which a launch asks for the stream.
DRIVER = SimpleNamespace(
    runtime=SimpleNamespace(
        driver=SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0)),
    )
)


def arguments(given: Mapping[str, Any], signature: Mapping[str, Any], sizes: tuple[str, ...]) -> dict[str, Any]:
    """As the body reads them: descriptors, numbers and captures, whatever else they are."""
    found = dict(given)
    for name, kind in signature.items():
        if name.endswith("_desc") and kind != "constexpr":
            found[name] = _described(found[name], kind)
    found.update({name: block(found[name]) for name in sizes})
    return {**found, "captures": tuple(map(pointer, found["captures"]))}


def _described(given: Any, kind: str) -> Descriptor:
    tile = re.search(r"\[([\d, ]+)\]", kind)
    assert tile is not None
    memory = torch.as_strided(given.base, given.shape, given.strides)
    return Descriptor(memory, tuple(map(int, tile.group(1).split(","))))


def pointer(tensor: Tensor) -> Pointer:
    """To a tensor's memory."""
    return Pointer(torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0))


def function(gl: Any) -> Callable[[str | None], Any]:
    """What makes a program of its text."""

    def made(text: str | None) -> Any:
        names: dict[str, Any] = {"jit": lambda function: function, "tl": gl}
        exec(text or "program = None", names)
        return names["program"]

    return made
