"""What fails on a GPU while it is prepared is a result: its reason is kept, and its memory given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmark.clock import Call, graphed

__all__ = ["all_graphed", "give_back", "noted"]


@contextmanager
def noted(absent: dict[str, str], name: str) -> Iterator[None]:
    """Puts a failure's reason among those that are ``absent``."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
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
