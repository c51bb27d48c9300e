"""``attnfuse tune``: what it measures, keeps and says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnfuse.candidates import Sizes, problem_of
from attnfuse.kernels import Problem, choose, lookup, measured
from attnfuse.kernels.cpu import cost
from attnfuse.kernels.schedule import Schedule
from attnfuse.target import Target
from attnfuse.tuning import as_measured, measure, standard
from tests.cli.conftest import Ended
from tests.kernels.test_registry import problem

CPU = Target("cpu")
CAUSAL, SMALL = "where(n <= m, 0.125 * s, -inf)", "1,2,2,64,64,16"
QUICK = ("--target", "cpu", "--seconds", "0.001")

Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("ATTNFUSE_CALIBRATE", raising=False)
    monkeypatch.setenv("ATTNFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "speed", lambda dtype: None)
    measured.forget()
    yield tmp_path / "cache"
    measured.forget()


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("tuned-*.json")) if cache.exists() else []


def small() -> Problem:
    return problem_of(CAUSAL, Sizes.parse(SMALL), torch.float32)


def eager(of: Problem) -> Problem:
    return replace(of, compiled=False)


def test_what_is_measured_is_kept_and_chosen_by(command: Command, cache: Path) -> None:
    before = choose(small(), CPU)
    ended = command("tune", CAUSAL, "--sizes", SMALL, "--eager", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split("\t") for line in ended.out.splitlines() if "\t" in line]
    assert [row[0] for row in rows] == ["blocked", "direct", "sdpa", "unfused, written, eager"]
    assert all(row[1].endswith(" ms") for row in rows)
    (file,) = files(cache)
    assert f"kept in {file}" in ended.out
    content = json.loads(file.read_text())["content"]
    assert content["machine"]["torch"] == torch.__version__
    after = choose(small(), CPU)
    # the fastest by the clock is the fastest by the corrected model
    assert f"the fastest kernel is {after.kernel}" in ended.out
    assert after.seconds != before.seconds


def test_a_dry_run_keeps_nothing(command: Command, cache: Path) -> None:
    ended = command("tune", CAUSAL, "--sizes", SMALL, "--eager", "--dry-run", *QUICK)
    assert ended.code == 0
    assert "nothing is kept" in ended.out
    assert not cache.exists()


def test_an_archive_with_its_backward(command: Command, archive: Path, cache: Path) -> None:
    ended = command("tune", archive, "--training", *QUICK)
    assert ended.code == 0
    assert "scale 0.5, causal" in ended.out
    # a .pt2 runs as it is, unless it is said otherwise
    assert "unfused, written, eager" in ended.out
    assert "training" in files(cache)[0].read_text()
    assert command("tune", archive, "--dry-run", "--dtype", "bfloat16", *QUICK).code == 0


def test_clear(command: Command, cache: Path) -> None:
    assert command("tune", CAUSAL, "--sizes", SMALL, "--eager", *QUICK).code == 0
    damaged = cache / "tuned-something.damaged"
    damaged.write_text("x")
    ended = command("tune", "--clear")
    assert (ended.code, ended.out) == (0, "files deleted: 2\n")
    assert not files(cache)
    assert not damaged.exists()


def test_what_cannot_be_measured(command: Command, cache: Path) -> None:
    for arguments, code, words in (
        ((CAUSAL, "--target", "xpu:of-nobody"), 3, "cannot be measured here"),
        (("where(", *QUICK), 3, ""),
        ((CAUSAL, "--sizes", "1,2", *QUICK), 3, "is not six sizes"),
        (("nowhere.pt2",), 3, "nowhere.pt2"),
        ((CAUSAL, "--seconds", "-1"), 2, "--seconds"),
    ):
        ended = command("tune", *arguments)
        assert ended.code == code, ended
        assert words in ended.err
        assert len(ended.err.splitlines()) == 1
    assert not files(cache)


def test_a_cache_that_cannot_be_written(command: Command, cache: Path) -> None:
    cache.write_text("a file stands where the folder should be")
    ended = command("tune", CAUSAL, "--sizes", SMALL, "--eager", *QUICK)
    assert ended.code == 3
    assert "cannot write" in ended.err


@pytest.mark.slow
def test_compiled_rivals_are_compiled() -> None:
    figures = {each.name: each for each in measure(small(), CPU, 0.001, lambda words: None)}
    assert figures["unfused, written, compiled"].seconds, figures
    assert "flex" not in figures or figures["flex"].seconds, figures


def test_a_kernel_that_fails_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*operands: object) -> torch.Tensor:
        raise RuntimeError("no room\nfor that")

    monkeypatch.setattr(lookup("direct"), "run", fails)
    figures = {each.name: each for each in measure(eager(small()), CPU, 0.001, lambda words: None)}
    assert figures["direct"].remark == "failed with RuntimeError: no room"
    assert "direct" not in as_measured(list(figures.values())).ratios


def test_schedules_are_tried_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = lookup("blocked")
    tried: list[str] = []

    def run_by(schedule: Any, spec: Any, operands: Any) -> torch.Tensor:
        tried.append(schedule.order)
        out = blocked.run(spec, operands)
        return out if schedule.order == "plain" else out + 1

    monkeypatch.setattr(blocked, "schedules", lambda *_: (Schedule(order="persistent"), Schedule()), raising=False)
    monkeypatch.setattr(blocked, "run_by", run_by, raising=False)
    monkeypatch.setattr("attnfuse.tuning.figures.NOTICEABLE", float("inf"))
    told: list[str] = []
    (figure,) = (f for f in measure(eager(small()), CPU, 0.001, told.append) if f.name == "blocked")
    assert {"plain", "persistent"} == set(tried)
    assert "schedule 2 of 2" in told
    # the other one computes something else
    assert figure.schedule["order"] == "plain"
    assert as_measured([figure]).schedules["blocked"]["rows"] == 64


@pytest.mark.parametrize("name", ["dropout", "sink", "padding", "documents", "sigmoid", "everything"])
def test_every_kind_of_operand_is_made(name: str) -> None:
    figures = measure(eager(problem(name, rows=32, keys=32)), CPU, 0.001, lambda words: None)
    assert all(each.seconds for each in figures), figures


def test_the_standard_set() -> None:
    for target in (CPU, Target("cuda", "sm90")):
        asked = list(standard(target))
        cases = {measured.case_of(each.problem) for each in asked}
        assert len(cases) == len(asked) > 10
        assert {each.target for each in asked} == {target}
    kinds = {measured.case_of(each.problem).kind.partition(",")[0] for each in standard(CPU)}
    # what it is measured under is what models' attention is looked up by
    assert {"plain", "causal", "causal window", "softcap causal"} <= kinds
