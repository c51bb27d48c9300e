"""Processes that prepare something each, all at the same time, and then answer questions one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmark.failures import reason_of

__all__ = ["Absent", "Answers", "Worker", "ready"]

#: What a process can be asked, by name.
Answers = Mapping[str, Callable[..., Any]]

#: Threads may start processes, multiprocessing's own lists of them are nobody's.
_STARTING = threading.Lock()


class Absent(Exception):
    """Why a process has no answer."""


class Worker:
    """One process, which runs ``make`` and then answers; it ends with its parent, or when it is told to."""

    def __init__(self, make: Callable[[], Answers]) -> None:
        context = get_context("forkserver")
        # no more: other imports touch the GPU, after which a process that uses it cannot be forked
        context.set_forkserver_preload(["torch"])
        with _STARTING:
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
            self._process.start()
            theirs.close()
        self._failure: str | None = None

    def wait(self, until: float) -> str | None:
        """Until it is ready, or has failed, or the clock says ``until``, which ends it; why it is not ready."""
        try:
            self._answer(until)
        except Absent as failure:
            return str(failure)
        return None

    def ask(self, question: str, *args: object, until: float | None = None) -> Any:
        """The answer; raises :class:`Absent` where there is none, or none when the clock says ``until``."""
        if self._failure is not None:
            raise Absent(self._failure)
        try:
            self._pipe.send((question, args))
        except ConnectionError:
            self._fail("its process died")
        return self._answer(until)

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.join()

    def _answer(self, until: float | None) -> Any:
        try:
            if not self._pipe.poll(None if until is None else max(0.0, until - time.monotonic())):
                # what others are asked would be disturbed
                self.end()
                self._fail("it was not ready in time")
            failure, found = self._pipe.recv()
        except (EOFError, ConnectionError):
            failure, found = "its process died", None
        if failure:
            self._fail(failure)
        return found

    def _fail(self, reason: str) -> None:
        self._failure = reason
        raise Absent(reason)


def ready(workers: Mapping[Any, Worker], seconds: float) -> None:
    """Waits for all of them so long at most."""
    until = time.monotonic() + seconds
    for worker in workers.values():
        worker.wait(until)


def _serve(pipe: Connection, make: Callable[[], Answers]) -> None:
    answers: dict[str, Callable[..., Any]] = {"begin": lambda: answers.update(make())}
    question, args = "begin", ()
    while True:
        try:
            pipe.send(("", answers[question](*args)))
        except Exception as error:  # noqa: BLE001 - it is handed on
            pipe.send((reason_of(error), None))
        try:
            question, args = pipe.recv()
        except EOFError:
            return
