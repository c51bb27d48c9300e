"""Processes that the benchmark of whole models asks: what they answer, and what becomes of those that cannot."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def able() -> dict[str, Any]:
    return {"double": lambda x: 2 * x, "fail": lambda: 1 // 0}


def failing() -> dict[str, Any]:
    raise MemoryError("no room\nat all")


def dying() -> dict[str, Any]:
    os._exit(1)


def late() -> dict[str, Any]:
    time.sleep(60)
    return {}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark import workers

    return workers


def test_answers_and_failures(workers: Any) -> None:
    asked = {make: workers.Worker(make) for make in (able, failing, dying)}
    workers.ready(asked, 60.0)
    assert asked[able].ask("double", 21) == 42
    for make, reason in ((failing, "MemoryError: no room"), (dying, "its process died")):
        with pytest.raises(workers.Absent, match=reason):
            asked[make].ask("double", 21)
    with pytest.raises(workers.Absent, match="ZeroDivisionError"):
        asked[able].ask("fail")
    for worker in asked.values():
        worker.end()


def test_nobody_waits_for_ever(workers: Any) -> None:
    worker = workers.Worker(late)
    workers.ready({"late": worker}, 0.1)
    with pytest.raises(workers.Absent, match="not ready in time"):
        worker.ask("double", 1)
    worker.end()
