"""Compiles what will be timed in parallel, each in another process: it is then found in the caches on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmark.failures import reason_of

__all__ = ["Prepare", "compile_ahead"]

#: Makes inputs and the call that is timed, or None; it travels to another process.
Prepare = Callable[[], Callable[[], object] | None]

#: Processes share the GPU's memory while they compile.
MOST_PROCESSES = 12
#: Tasks of a process, where this Python's pools can be told.
_ONCE: dict[str, Any] = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}
#: No more: other imports touch the GPU, after which a process that uses it cannot be forked.
_IMPORTED = ("torch",)


def compile_ahead(tasks: Mapping[str, Prepare]) -> list[str]:
    """Runs each task once, in their order; what failed, which fails again where it is timed.

    Each has a process of its own: one that read outside of memory can use the GPU no more.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    workers = min(MOST_PROCESSES, os.cpu_count() or 1, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=context, **_ONCE) as pool:
        return [failure for failure in pool.map(_run_once, tasks, tasks.values()) if failure]


def _run_once(name: str, prepare: Prepare) -> str:
    # the processes are the parallelism
    torch._inductor.config.compile_threads = 1
    torch.compiler.reset()
    try:
        call = prepare()
        if call is not None:
            call()
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - it is returned
        return f"{name}: {reason_of(error)}"
    return ""
