"""A report's regions in words and as drawings, and what the command says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from attnfuse import rewrite
from attnfuse.cli import run
from attnfuse.errors import BadInput
from attnfuse.picture import as_dot, as_svg, as_text
from attnfuse.report import Lying, Region
from tests.place.conftest import Picky
from tests.place.programs import CASES
from tests.support.doors import as_module

BY_NAME = {case.name: case for case in CASES}


def regions(name: str, picky: Picky) -> tuple[Region, ...]:
    case = BY_NAME[name]
    program = torch.export.export(as_module(case.program), case.inputs())
    return rewrite(program, custom_op=True, kernel=picky(seconds=1e-6), profit=False, target="cuda:sm90")[1].regions


def test_a_decision_in_words(picky: Picky) -> None:
    lines = as_text(regions("from_a_linear", picky)).splitlines()
    assert lines[0] == "matmul_1: propagated into linear, saves 1.54 us; copies 0 -> 0"
    assert lines[1].split() == ["linear", "d", "->", "n", "linear"]
    assert lines[-1].split(";")[0] == "  chosen: 1 us"
    assert "left to the kernel: 2.54 us" in lines[-1]
    copied = as_text(regions("graph_input", picky)).splitlines()
    assert copied[0].startswith("matmul_1: copied at v, saves ")
    assert copied[1].split() == ["v", "d", "fixed:", "input", "copied,", "1.88", "ns"]


def test_equal_regions_are_one_paragraph(picky: Picky) -> None:
    (region,) = regions("from_a_linear", picky)
    assert as_text((region, region)).splitlines()[0].startswith("matmul_1 and 1 like it: ")
    assert as_text(()) == "no kernel would be faster with an operand in another layout"


def test_a_drawing_has_every_value_and_every_copy(picky: Picky) -> None:
    dot = as_dot(regions("graph_input", picky)).decode()
    assert dot.startswith("digraph layouts {")
    assert dot.count("fillcolor=") == 2
    assert 'r0_0 -> r0_1 [style=dashed, label="copy, 1.88 ns"];' in dot


def test_names_are_quoted() -> None:
    region = Region(
        ("a",), (Lying('quo"te', "x", "d", "d"),), (0, 0), dict.fromkeys(("fold", "copy", "propagate", "chosen"), 0.0)
    )
    assert 'label="quo\\"te\\nx, d-minor"' in as_dot([region]).decode()


def test_a_drawing_without_graphviz_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="which is not installed"):
        as_svg([])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A program whose value lies as no CPU kernel wants it: made by a convolution."""
    case = BY_NAME["convolution"]
    path = tmp_path / "in.pt2"
    torch.export.save(torch.export.export(as_module(case.program), case.inputs(torch.float32)), path)
    return path


def test_explain_says_and_draws(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "layouts.dot"
    assert run(["explain", str(saved), "--layouts", "--dot", str(drawing)]) == 0
    assert "copies" in capsys.readouterr().out
    assert drawing.read_text().startswith("digraph")
