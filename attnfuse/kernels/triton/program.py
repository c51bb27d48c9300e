"""Jit functions made of program texts. Triton reads a function's source from its file: here that file is in memory."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from functools import lru_cache, partial
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
    return compiled(partial(function_text, program, captures, fast=fast, wide=wide), triton.jit, tl)


def compiled(text: Callable[..., str], jit: Callable[..., Any], language: ModuleType) -> Any:
    """The function of ``text(name=...)``: with ``triton.jit`` and ``triton.language``, or with Gluon's.

    Its name is made of its text: Triton knows functions by name, and takes two of one name in one kernel for one.
    """
    digest = hashlib.sha256(text(name="program").encode()).hexdigest()[:16]
    name, filename = f"program_{digest}", f"<attnfuse program {digest}>"
    source = text(name=name)
    # without a time of change it is never looked for on disk
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"jit": jit, "tl": language, "__name__": __name__}
    # our own text, of a closed set of operations
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]
