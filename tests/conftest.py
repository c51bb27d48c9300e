"""Seeds, threads, hypothesis profiles and golden files, for every test."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.support.golden import Golden

# Timings vary with the machine, so no deadline; drawing a spec and a spelling is slow by hypothesis's standards.
_COMMON = settings(
    deadline=None,
    report_multiple_bugs=False,
    # without the search for explanations, which replays a failure hundreds of times
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
settings.register_profile("ci", _COMMON, derandomize=True, max_examples=40)
settings.register_profile("night", _COMMON, max_examples=2000, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files from what is computed now")
    night = parser.getgroup("night", "the random search of --hypothesis-profile=night")
    night.addoption("--night-programs", type=int, default=100_000, help="how many random programs to try")
    night.addoption("--night-misses", type=int, default=20_000, help="how many near misses to try")
    night.addoption("--night-seed", type=int, default=0, help="where the search starts; another seed, other programs")


def pytest_configure(config: pytest.Config) -> None:
    # two cores are shared by xdist workers, and a fixed thread count fixes the order of summation
    torch.set_num_threads(1)
    # the kernel that is chosen must not depend on the machine
    os.environ["ATTNFUSE_CALIBRATE"] = "0"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How much was searched, from which seed on, and with what result."""
    totals: dict[str, list[int]] = {}
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for name, value in (pair for report in reports for pair in report.user_properties):
        if name == "tally":
            what, *numbers = value
            totals[what] = [a + b for a, b in zip(totals.get(what, [0] * len(numbers)), numbers, strict=True)]
    for what, (tried, fused, _) in totals.items():
        seed = config.getoption("--night-seed")
        terminalreporter.write_line(f"{tried} random {what} from seed {seed}, {fused} fused, no wrong answer in them")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random stream, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(text, name)``: text must equal ``tests/golden/<name>.txt``; ``--update-golden`` writes it there."""
    return Golden(update=request.config.getoption("--update-golden"))
