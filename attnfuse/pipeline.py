"""Runs stages over a state: times each, checks the graph, prints what was asked for, and rations fusions."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from attnfuse.errors import BadInput

__all__ = ["FUEL", "Fuel", "Stage", "run"]

log = logging.getLogger(__name__)

S = TypeVar("S")


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A step of the rewrite: ``run`` maps a state to the next."""

    name: str
    run: Callable[[S], S]


def run(
    stages: Sequence[Stage[S]],
    state: S,
    *,
    show: Callable[[S], str],
    check: Callable[[S, str], None],
    print_after: str | None = None,
) -> tuple[S, dict[str, float]]:
    """The state after all stages, and the seconds each took.

    ``print_after`` names a stage after which ``show(state)`` goes to stderr, or is ``"all"``. Raises
    :class:`BadInput` for an unknown stage, and whatever ``check(state, stage)`` raises.
    """
    names = [stage.name for stage in stages]
    if print_after not in (None, "all", *names):
        raise BadInput(f"there is no stage {print_after!r}; the stages are {', '.join(names)}")
    seconds: dict[str, float] = {}
    for stage in stages:
        start = time.perf_counter()
        state = stage.run(state)
        seconds[stage.name] = time.perf_counter() - start
        check(state, stage.name)
        log.debug("after %s (%.3f s):\n%s", stage.name, seconds[stage.name], _Lazy(show, state))
        if print_after in ("all", stage.name):
            sys.stderr.write(f"--- after {stage.name}\n{show(state)}\n")
    return state, seconds


@dataclass(frozen=True)
class _Lazy(Generic[S]):
    """Text that is made only if a log record is."""

    show: Callable[[S], str]
    state: S

    def __str__(self) -> str:
        return self.show(self.state)


@dataclass
class Fuel:
    """How many more fusions this process may make: ``ATTNFUSE_FUEL=n``, to find by bisection the one that is wrong."""

    variable: str = "ATTNFUSE_FUEL"
    spent: int = 0

    def take(self) -> bool:
        """Whether one more fusion is allowed. Raises :class:`BadInput` when the variable is no number."""
        allowed = os.environ.get(self.variable)
        if allowed is not None and not allowed.isdigit():
            raise BadInput(f"{self.variable}={allowed!r} is not a number of fusions")
        if allowed is not None and self.spent >= int(allowed):
            return False
        self.spent += 1
        return True


FUEL = Fuel()
