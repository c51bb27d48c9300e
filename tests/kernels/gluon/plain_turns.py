"""Partitions of :mod:`tests.kernels.gluon.plain` take turns: a fast one always runs before a slow one does anything.

Each is a thread, but only one runs, until it waits or a faster one can go on. So every run of the same speeds is the
same, what a slow partition leaves in flight is seen as late as can be, and where all wait there is no more to wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["HERE", "Turns", "others_first", "until"]

#: Of this thread: its turns and its number among them, products and copies that it has in flight.
HERE = threading.local()


class _Stopped(BaseException):
    """Another partition failed."""


class Turns:
    """Runs partitions to their end; ``speed`` has their numbers, the fastest first."""

    def __init__(self, speed: Sequence[int]) -> None:
        self.speed = speed
        self.waiting: dict[int, Callable[[], bool]] = {each: (lambda: True) for each in speed}
        self.changed = threading.Condition()
        self.running = -1
        self.failure: BaseException | None = None

    def run(self, partitions: Sequence[Callable[[], None]]) -> None:
        """Raises the first failure of any."""
        threads = [threading.Thread(target=self._one, args=each, daemon=True) for each in enumerate(partitions)]
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def until(self, me: int, ready: Callable[[], bool]) -> None:
        """Lets the faster ones run, and the slower ones while this one is not ready."""
        self.waiting[me] = ready
        self._next()
        self._begin(me)

    def _one(self, me: int, partition: Callable[[], None]) -> None:
        HERE.turns, HERE.me = self, me
        try:
            self._begin(me)
            partition()
        except _Stopped:
            return
        except BaseException as failure:  # noqa: BLE001 - raised again where the launch is
            self._stop(failure)
            return
        self._next()

    def _begin(self, me: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running == me or self.failure is not None)
        if self.failure is not None:
            raise _Stopped
        del self.waiting[me]

    def _next(self) -> None:
        found = next((each for each in self.speed if each in self.waiting and self.waiting[each]()), None)
        if found is None and self.waiting:
            self._stop(AssertionError(f"a phase never comes: partitions {sorted(self.waiting)} wait for it"))
            return
        with self.changed:
            self.running = -1 if found is None else found
            self.changed.notify_all()

    def _stop(self, failure: BaseException) -> None:
        with self.changed:
            self.failure = failure
            self.changed.notify_all()


def until(ready: Callable[[], Any]) -> None:
    """The partition that calls it goes on when it is ready, and no faster one is."""
    HERE.turns.until(HERE.me, ready)


def others_first() -> None:
    """Faster partitions go on as far as they can."""
    until(lambda: True)
