"""Jit functions made of program texts. Triton reads a function's source from its file: here that file is in memory."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from attnfuse.kernels.triton.text import function_text
from attnfuse.score import Expr
from attnfuse.spec import Captured

__all__ = ["compiled", "jit_function"]


@lru_cache(maxsize=1024)
def jit_function(
    program: Expr | None, captures: tuple[Captured, ...], *, fast: bool = False, wide: bool = False
) -> Any:
    """``program`` as a ``triton.jit`` function of :data:`attnfuse.kernels.triton.text.PARAMETERS`; None stays None."""
    if program is None:
        return None
    return compiled(function_text(program, captures, fast=fast, wide=wide), triton.jit, tl)


def compiled(source: str, jit: Callable[..., Any], language: ModuleType, name: str = "program") -> Any:
    """The function ``name`` of a text: with ``triton.jit`` and ``triton.language``, or with Gluon's."""
    filename = f"<attnfuse program {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # without a time of change it is never looked for on disk
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"jit": jit, "tl": language, "__name__": __name__}
    # our own text, of a closed set of operations
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]
