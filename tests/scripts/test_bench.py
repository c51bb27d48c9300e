"""The benchmark runs, prints every peer, and judges its figures rightly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_peer_has_a_figure(tmp_path: Path) -> None:
    done = bench("--only", "llama", "--dtypes", "float32", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert list(row["figures"]) == ["eager", "inductor", "SDPA by hand", "flex by hand", "attnfuse"], row["absent"]
    for figure in row["figures"].values():
        assert figure["milliseconds"] > 0
        # all five compute the same thing: float32 rounding is the only difference
        assert figure["max_error"] < 1e-5
    assert "worst row" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only", "llamma"), "no variant is called 'llamma'"),
        (("--dtypes", "fp8"), "no dtype is called 'fp8'"),
        (("--lengths", "many"), "'many' is no length"),
        (("--device", "tpu"), "'tpu' cannot be measured"),
        (("--layouts", "--device", "tpu"), "'tpu' is none of cpu, cuda, xpu"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: tuple[str, ...], complaint: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert complaint in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_layouts_are_measured_into_a_table(tmp_path: Path) -> None:
    done = bench("--layouts", "--json", str(tmp_path / "layouts.json"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "layouts.json").read_text())
    assert table["target"] == "cpu"
    assert min(table["stream"], *table["copy"].values()) > 0
    assert set(table["factors"]) <= {"sdpa", "blocked", "direct"}
    assert "measured by scripts/bench.py --layouts" in table["source"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules that the script is made of."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmark import cases, measure, targets

    case = cases.Case("llama", 2048, "float32")
    figures = {"attnfuse": measure.Figure(1.0, 10_000_000, 0.0, 0.0)}
    row = measure.Row(case, figures, absent={}, kernel="sdpa", ratio=0.5, speedup=2.0)
    return targets, row


def test_the_worst_row_decides(parts: Any) -> None:
    targets, row = parts
    assert all(target.met for target in targets.speed([row, replace(row, ratio=1.04)]))
    assert not targets.speed([row, replace(row, ratio=1.06)])[0].met
    assert not targets.speed([replace(row, ratio=math.nan), row])[0].met
    assert not targets.speed([row, replace(row, speedup=1.0)])[1].met


@pytest.mark.parametrize(("factor", "met"), [(2, True), (4, False)])
def test_memory_may_double_with_the_length_not_quadruple(parts: Any, factor: int, met: bool) -> None:
    targets, row = parts
    figure = replace(row.figures["attnfuse"], peak=factor * row.figures["attnfuse"].peak)
    longer = replace(row, case=replace(row.case, length=4096), figures={"attnfuse": figure})
    (target,) = targets.growth([row, longer])
    assert target.value == pytest.approx(math.log2(factor))
    assert target.met is met
    assert targets.growth([row, replace(longer, kernel="unfused")]) == []
