"""``torch.compile(model, backend="attnfuse")``: fuses attention in Dynamo's graph; another backend compiles it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from attnfuse.fuse import fuse_graph
from attnfuse.kernels import digest
from attnfuse.options import Options

__all__ = ["attnfuse"]

#: The backend that compiles the rewritten graph, unless ``options={"inner": name}`` names another.
_INNER = "inductor"


def attnfuse(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Dynamo backend. ``options`` may hold those of :class:`attnfuse.options.Options`, ``inner`` (the backend that
    compiles the result, default Inductor), and Inductor's own; ``mode`` is Inductor's.

    Raises :class:`~attnfuse.errors.BadInput` for a bad value of one of ours.
    """
    given = dict(options or {})
    inner = given.pop("inner", _INNER)
    ours = {f.name: given.pop(f.name) for f in fields(Options) if f.name in given}
    ours.setdefault("compiled", inner == _INNER)
    fused = fuse_graph(gm, example_inputs, **ours)
    with _cache_key():
        compiled: Callable[..., Any] = _compiler(inner, mode, given)(fused, list(example_inputs))
        return compiled


def _compiler(inner: str, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The inner backend with its mode and options, which Inductor is told by what torch.compile wraps it in."""
    if inner == _INNER:
        wrapped: Callable[..., Any] = torch._TorchCompileInductorWrapper(mode, options, None)
        return wrapped
    rest = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    return partial(lookup_backend(inner), **rest)


@contextmanager
def _cache_key() -> Iterator[None]:
    """Compiled code is cached on disk by its graph; our version and kernels must be part of the key."""
    config = torch.compiler.config
    before = config.cache_key_tag
    config.cache_key_tag = f"{before}attnfuse-{digest()}"
    try:
        yield
    finally:
        config.cache_key_tag = before
