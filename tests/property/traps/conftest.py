"""Hazards are set in every kind of graph; other traps in one kind each, and at night in all."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import settings

from tests.support.doors import DOORS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "door" not in metafunc.fixturenames:
        return
    doors = list(DOORS)
    everywhere = metafunc.module.__name__.endswith("hazards") or settings().max_examples > 100
    chosen = doors if everywhere else [doors[zlib.crc32(metafunc.function.__name__.encode()) % len(doors)]]
    metafunc.parametrize("door", chosen)
