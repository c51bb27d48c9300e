"""Where transposes end up: golden graphs, copies counted, and the same numbers through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from attnfuse import Report, rewrite
from attnfuse.graph.text import render
from tests.place.conftest import TRANSPOSED_VALUE, Factors, Picky
from tests.place.programs import CASES, WIDTH, B, Case, D, H, N, attend, heads
from tests.support.doors import DOORS, as_module, rewritten
from tests.support.golden import Golden

TOLERANCE = 1e-12  # float64, sums of at most a hundred numbers of order one

BY_CASE = {case.name: case for case in CASES}
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


def fused(case: Case, door: str, picky: Picky, factors: Factors, seconds: float = 1.0, **options: Any) -> Report:
    """The report of a case, its numbers checked."""
    module, inputs = as_module(case.program), case.inputs()
    found = rewritten(door, module, inputs, kernel=picky(factors, seconds), target="cuda:sm90", **options)
    picky.seen.clear()
    for mine, true in zip(_each(found.run(*inputs)), _each(module(*inputs)), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=TOLERANCE)
    return found.report


@pytest.mark.parametrize("door", ["dynamo", "training IR"])
@pytest.mark.parametrize("name", ["from_a_linear", "through_a_cache_that_stays_inside", "one_product_for_all"])
def test_symbolic_sizes(name: str, door: str, picky: Picky) -> None:
    fused(BY_CASE[name], door, picky, TRANSPOSED_VALUE, dynamic=True)
    assert picky.layouts("value") == {"n"}


def test_a_copy_that_costs_more_than_it_gains_is_not_made(picky: Picky) -> None:
    report = fused(BY_CASE["graph_input"], "training IR", picky, TRANSPOSED_VALUE, seconds=1e-9)
    assert picky.layouts("value") == {"d"}
    assert report.regions[0].copies == (0, 0)
    # from a linear layer it is free, and taken all the same
    fused(BY_CASE["from_a_linear"], "training IR", picky, TRANSPOSED_VALUE, seconds=1e-9)
    assert picky.layouts("value") == {"n"}


def test_operands_of_one_product_that_want_different_layouts(picky: Picky) -> None:
    """Turning the product would turn the query as well: the part that is the value is copied."""
    factors = {**TRANSPOSED_VALUE, "query": {"d": 1.0, "n": 3.0}}
    report = fused(BY_CASE["one_product_for_all"], "training IR", picky, factors)
    assert (picky.layouts("query"), picky.layouts("value")) == ({"d"}, {"n"})
    assert report.regions[0].copies == (0, 1)


def test_one_tensor_that_is_key_and_value(picky: Picky) -> None:
    """What the key loses and the value gains is weighed; nothing is copied for either alone."""
    for lost, layout in ((1.5, "n"), (3.0, "d")):
        fused(SHARED, "training IR", picky, {**TRANSPOSED_VALUE, "key": {"d": 1.0, "n": lost}})
        assert (picky.layouts("key"), picky.layouts("value")) == ({layout}, {layout})


@pytest.mark.parametrize("door", DOORS)
def test_the_key_is_placed_too(door: str, picky: Picky) -> None:
    fused(TRANSPOSED_KEY, door, picky, {"key": {"d": 2.0, "n": 1.0}})
    assert picky.layouts("key") == {"n"}


@pytest.mark.parametrize("door", DOORS)
def test_a_transposed_value_is_turned_back_where_kernels_read_columns(door: str, picky: Picky) -> None:
    fused(BY_CASE["convolution"], door, picky, {"value": {"d": 1.0, "n": 2.0}})
    assert picky.layouts("value") == {"d"}


def test_values_that_are_written_to_stay_where_they_are(picky: Picky) -> None:
    report = fused(WRITTEN, "dynamo", picky, TRANSPOSED_VALUE)
    assert [value.what for value in report.regions[0].values] == ["fixed: transpose", "operand"]


def test_parameters_stay_what_they_are(picky: Picky) -> None:
    model = Tied().double()
    program = torch.export.export(model, (torch.randn(B, N, WIDTH, dtype=torch.float64),))
    result, report = rewrite(program, custom_op=True, kernel=picky(), profit=False, target="cuda:sm90")
    assert {site.layouts["value"] for site in report.fused} == {"n"}
    assert result.state_dict.keys() == program.state_dict.keys()
    assert all(new is program.state_dict[name] for name, new in result.state_dict.items())
    other = Tied().double()
    loaded = result.module()
    loaded.load_state_dict(other.state_dict())
    x = torch.randn(B, N, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), other(x), rtol=0, atol=TOLERANCE)


def test_a_saved_program_lies_as_it_says(picky: Picky, tmp_path: Path) -> None:
    """Every fake value has the strides that its operator gives it."""
    case = BY_CASE["through_a_bias"]
    program = torch.export.export(as_module(case.program), case.inputs())
    result, _ = rewrite(program, custom_op=True, kernel=picky(), profit=False, target="cuda:sm90")
    torch.export.save(result, tmp_path / "out.pt2")
    loaded = torch.export.load(tmp_path / "out.pt2")
    found = Recorder(loaded.graph_module).strides(*case.inputs())
    assert found == {node.name: node.meta["val"].stride() for node in loaded.graph.nodes if node.name in found}
    torch.testing.assert_close(loaded.module()(*case.inputs()), case.program(*case.inputs()), rtol=0, atol=TOLERANCE)


def test_a_bug_leaves_the_layouts_alone(picky: Picky, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("attnfuse.layouts.extract", broken)
    (site,) = fused(BY_CASE["from_a_linear"], "training IR", picky, TRANSPOSED_VALUE).fused
    assert picky.layouts("value") == {"d"}
    assert site.notes == ("placing transposes failed with RuntimeError: out of order, which is a bug of attnfuse",)


class Recorder(Interpreter):
    """The strides that each call's result really has."""

    def strides(self, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
        self.found: dict[str, tuple[int, ...]] = {}
        self.run(*inputs)
        return self.found

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            self.found[n.name] = result.stride()
        return result


class Tied(nn.Module):
    """Key and value by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.value.weight = self.key.weight

    def forward(self, x: Tensor) -> Tensor:
        return attend(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)))


def _shared(q: Tensor, x: Tensor, w: Tensor) -> Tensor:
    latent = heads(torch.nn.functional.linear(x, w))
    return attend(q, latent, latent)


def _transposed_key(q: Tensor, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return attend(q, heads(torch.nn.functional.linear(x, w)), v)


def _written(q: Tensor, k: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return attend(q, k, heads(torch.nn.functional.linear(x, w).mul_(2)))


_ROWS, _X, _W = (B, H, N, D), (B, N, WIDTH), (WIDTH, WIDTH)
SHARED = Case(_shared, (_ROWS, _X, _W))
TRANSPOSED_KEY = Case(_transposed_key, (_ROWS, _X, _W, _ROWS))
WRITTEN = Case(_written, (_ROWS, _ROWS, _X, _W))
