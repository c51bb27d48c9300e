"""Where transposes end up: golden graphs, copies counted, and the same numbers through every door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnfuse import Report, rewrite
from attnfuse.graph.text import render
from tests.place.conftest import Picky
from tests.place.programs import CASES, Case
from tests.support.doors import DOORS, as_module, rewritten
from tests.support.golden import Golden

TOLERANCE = 1e-12  # float64, sums of at most a hundred numbers of order one

BY_NAME = [pytest.param(case, id=case.name) for case in CASES]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(update=request.config.getoption("--update-golden"), folder=Path(__file__).parent / "golden")


@pytest.mark.parametrize("case", BY_NAME)
def test_golden(case: Case, golden: Golden, picky: Picky) -> None:
    program = torch.export.export(as_module(case.program), case.inputs())
    result, report = rewrite(program, custom_op=True, kernel=picky(), profit=False, target="cuda:sm90")
    sections = {"before": render(program.graph_module), "after": render(result.graph_module), "report": str(report)}
    golden("\n\n".join(f"# {name}\n{text}" for name, text in sections.items()), case.name)


def test_every_file_belongs_to_a_case() -> None:
    assert {file.stem for file in (Path(__file__).parent / "golden").glob("*.txt")} == {case.name for case in CASES}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BY_NAME)
def test_the_kernel_gets_its_layout_and_the_numbers_stay(case: Case, door: str, picky: Picky) -> None:
    module, inputs = as_module(case.program), case.inputs()
    found = rewritten(door, module, inputs, kernel=picky(), target="cuda:sm90")
    assert {site.layouts["value"] for site in found.report.fused} == {"n"}
    before, after = _copies(found.report)
    # core ATen multiplies batches of matrices alone, and copies for that
    assert (before, after) == case.copies or (door == "core ATen" and after <= max(before, case.copies[1]))
    picky.seen.clear()
    ours = found.run(*inputs)
    assert picky.layouts("value") == {"n"}
    theirs = module(*inputs)
    for mine, true in zip(_each(ours), _each(theirs), strict=True):
        assert mine.stride() == true.stride()
        torch.testing.assert_close(mine, true, rtol=0, atol=TOLERANCE)


def _each(found: object) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _copies(report: Report) -> tuple[int, int]:
    counts = [region.copies for region in report.regions]
    return sum(before for before, _ in counts), sum(after for _, after in counts)
