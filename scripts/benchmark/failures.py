"""What fails on a GPU while it is prepared is a result: its reason is kept, and its memory given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmark.clock import Call, graphed

__all__ = ["all_graphed", "give_back", "noted", "reason_of"]


def reason_of(error: Exception) -> str:
    """What failed, in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def noted(absent: dict[str, str], name: str) -> Iterator[None]:
    """Puts a failure's reason among those that are ``absent``."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        absent[name] = reason_of(error)
    if name in absent:
        gc.collect()


def give_back() -> None:
    """Memory that nobody holds, to the device."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def all_graphed(calls: dict[str, Call], absent: dict[str, str]) -> dict[str, Call]:
    """Replays of the calls that can be captured."""
    found: dict[str, Call] = {}
    for name, call in calls.items():
        with noted(absent, name):
            found[name] = graphed(call)
        if name in absent:
            give_back()
    return found
