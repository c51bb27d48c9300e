"""Every trap is set in each kind of graph."""

from __future__ import annotations

import pytest

from tests.support.doors import DOORS


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return request.param
