"""Processes that prepare something each, all at the same time, and then answer questions one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Absent", "Answers", "Worker", "ready"]

#: What a process can be asked, by name.
Answers = Mapping[str, Callable[..., Any]]


class Absent(Exception):
    """Why a process has no answer."""


class Worker:
    """One process, which runs ``make`` and then answers; it ends with its parent, or when it is told to."""

    def __init__(self, make: Callable[[], Answers]) -> None:
        context = get_context("forkserver")
        # no more: other imports touch the GPU, after which a process that uses it cannot be forked
        context.set_forkserver_preload(["torch"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._failure: str | None = None

    def wait(self, until: float) -> None:
        """Until it is ready, or has failed, or the clock says ``until``."""
        if not self._pipe.poll(max(0.0, until - time.monotonic())):
            self._failure = "it was not ready in time"
            return
        try:
            self._answer()
        except Absent as failure:
            self._failure = str(failure)

    def ask(self, question: str, *args: object) -> Any:
        """The answer; raises :class:`Absent` where there is none."""
        if self._failure is not None:
            raise Absent(self._failure)
        self._pipe.send((question, args))
        return self._answer()

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            failure, found = self._pipe.recv()
        except (EOFError, ConnectionError):
            failure, found = "its process died", None
        if failure:
            self._failure = failure
            raise Absent(failure)
        return found


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
            pipe.send((f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", None))
        try:
            question, args = pipe.recv()
        except EOFError:
            return
