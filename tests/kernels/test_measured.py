"""What was measured on this machine corrects the model, for what it was measured of and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from attnfuse.kernels import UNFUSED, Problem, choose, digest, lookup, measured
from attnfuse.kernels.cpu import cost
from attnfuse.kernels.gluon.tuned import choices
from attnfuse.kernels.gluon.tuned import measured as measured_choices
from attnfuse.kernels.measured import Measured, case_of, keep, machine
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.memory import Memory
from attnfuse.kernels.triton.planning import plan_of
from attnfuse.target import Target
from tests.kernels.cases import SPECS
from tests.kernels.test_registry import problem

CPU, HOPPER = Target("cpu"), Target("cuda", "sm90")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("ATTNFUSE_CALIBRATE", raising=False)
    monkeypatch.setenv("ATTNFUSE_CACHE", str(tmp_path))
    # shipped rates, so that nothing but what is kept here differs between machines
    monkeypatch.setattr(cost, "speed", lambda dtype: None)
    measured.forget()
    yield tmp_path
    measured.forget()


def slower(name: str, than: Problem, by: float = 100.0) -> Measured:
    """Everything as modelled, but one kernel."""
    return Measured({**dict.fromkeys(choose(than, CPU).seconds, 1.0), name: by})


def kept(measurements: Measured, of: Problem) -> None:
    keep(CPU, {case_of(of): measurements})


def test_a_measurement_flips_the_choice_and_the_cache_key() -> None:
    before, key = choose(problem("causal"), CPU), digest()
    kept(slower(before.kernel, problem("causal")), problem("causal"))
    after = choose(problem("causal"), CPU)
    assert after.kernel != before.kernel
    assert after.seconds[before.kernel] == pytest.approx(100 * before.seconds[before.kernel])
    assert after.seconds[after.kernel] == before.seconds[after.kernel]
    assert digest() != key
    # the same of the same cache, in this process or another
    measured.forget()
    assert choose(problem("causal"), CPU) == after


def test_the_graph_as_it_is_is_measured_too() -> None:
    of = problem("causal")
    assert choose(of, CPU).pays
    kept(Measured({choose(of, CPU).kernel: 1.0, measured.rival(of): 1e-3}), of)
    assert not choose(of, CPU).pays
    # another source, or one that is not compiled, is another rival
    assert choose(replace(of, compiled=False), CPU).seconds[UNFUSED] > choose(of, CPU).seconds[UNFUSED]


def test_what_was_not_measured_is_off_as_much_as_the_rest() -> None:
    found = Measured({"sdpa": 2.0, "blocked": 8.0})
    assert found.ratio("direct") == pytest.approx(4.0)
    assert found.ratio("sdpa") == 2.0
    assert Measured().ratio("sdpa") == 1.0


def test_a_case_serves_its_kind_at_sizes_near_its_own() -> None:
    at = problem("causal", rows=1024, keys=1024)
    kept(Measured({"blocked": 7.0}), at)

    def ratio(of: Problem) -> float:
        return measured.near(of, CPU).ratio("blocked")

    assert ratio(at) == ratio(problem("causal", rows=2048, keys=2048)) == 7.0
    # constants cost nothing
    assert ratio(problem("causal, finite fill", rows=1000, keys=1000)) == 7.0
    for other in (
        problem("causal", rows=4096, keys=4096),
        problem("softcap, causal", rows=1024, keys=1024),
        problem("causal", rows=1024, keys=1024, dtype=torch.bfloat16),
        replace(at, value=replace(at.value, shape=(1, 8, 1024, 32))),
        replace(at, query=replace(at.query, requires_grad=True)),
    ):
        assert ratio(other) == 1.0


def test_the_nearest_case_wins() -> None:
    for length, factor in ((512, 2.0), (2048, 3.0)):
        of = problem("causal", rows=length, keys=length)
        kept(Measured({"blocked": factor}), of)
    assert measured.near(problem("causal", rows=600, keys=600), CPU).ratio("blocked") == 2.0
    assert measured.near(problem("causal", rows=1800, keys=1800), CPU).ratio("blocked") == 3.0


@pytest.mark.parametrize("name", ["reads the score twice", "sigmoid", "weights squared", "documents", "everything"])
def test_every_program_is_a_case(name: str) -> None:
    others = [case_of(problem(each)).kind for each in SPECS if each != name]
    assert case_of(problem(name)).kind not in others


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    before, key = choose(problem("causal"), CPU), digest()
    kept(slower(before.kernel, problem("causal")), problem("causal"))
    monkeypatch.setenv("ATTNFUSE_CALIBRATE", "0")
    assert choose(problem("causal"), CPU) == before
    assert digest() == key


@pytest.mark.parametrize("which", ["attnfuse", "torch", "kernels", "threads", "device"])
def test_other_versions_and_devices_have_other_files(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(slower("blocked", problem("causal")), problem("causal"))
    assert measured.near(problem("causal"), CPU) != Measured()
    known = machine.machine(CPU)
    assert known is not None
    monkeypatch.setattr(machine, "machine", lambda target: {**known, which: "another"})
    assert measured.near(problem("causal"), CPU) == Measured()


def test_a_target_that_is_not_here_has_none() -> None:
    assert measured.place(Target("xpu", "of nobody")) is None
    assert measured.near(problem("causal"), Target("xpu", "of nobody")) == Measured()


def test_a_damaged_file_leaves_the_model(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = choose(problem("causal"), CPU)
    kept(slower(before.kernel, problem("causal")), problem("causal"))
    (file,) = cache.glob("tuned-*.json")
    file.write_text(file.read_text().replace("100.0", "1e-9"))
    measured.forget()
    assert choose(problem("causal"), CPU) == before
    assert "is damaged (its checksum is another)" in caplog.text
    assert not file.exists()


def test_two_runs_add_up_and_clear_forgets() -> None:
    of, key = problem("causal"), digest()
    kept(Measured({"blocked": 2.0}), of)
    kept(Measured({"sdpa": 3.0}), of)
    assert measured.near(of, CPU).ratios == {"blocked": 2.0, "sdpa": 3.0}
    assert measured.clear() == 1
    assert measured.near(of, CPU) == Measured()
    assert digest() == key


class TestSchedules:
    """The fastest schedule of a device is what its kernel runs by."""

    @pytest.fixture(autouse=True)
    def _hopper(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(machine, "_device", lambda target: "of this test" if target == HOPPER else None)
        plan_of.cache_clear()
        yield
        plan_of.cache_clear()

    def planned(self, length: int = 1024) -> Schedule:
        strides = (8 * length * 64, length * 64, 64, 1)
        operands = [Memory((1, 8, length, 64), strides, torch.bfloat16, True)] * 3
        return plan_of(SPECS["causal"], *operands, (), (), HOPPER, "ieee").schedule

    def test_triton(self) -> None:
        of = problem("causal", rows=1024, keys=1024, dtype=torch.bfloat16)
        schedules = lookup("triton").schedules(of, HOPPER)
        assert self.planned() == schedules[0]
        other = schedules[3].with_knobs(waves_per_eu=2)
        keep(HOPPER, {case_of(of): Measured({}, {"triton": asdict(other)})})
        plan_of.cache_clear()
        assert self.planned() == other

    def test_keys_are_split_where_the_call_allows_it(self) -> None:
        of = problem("causal", rows=1024, keys=1024, dtype=torch.bfloat16)
        split = replace(lookup("triton").schedules(of, HOPPER)[1], algorithm="split keys", splits=4)
        keep(HOPPER, {case_of(of): Measured({}, {"triton": asdict(split)})})
        assert self.planned() == replace(split, algorithm="rows outside", splits=1)

    def test_rows_are_in_as_many_spans_as_the_call_wants(self) -> None:
        outside = Schedule("keys outside", rows=64, keys=64)
        of = problem("causal", rows=1024, keys=1024, dtype=torch.bfloat16)
        keep(HOPPER, {case_of(of): Measured({}, {"triton": asdict(outside)})})
        # 132 processors want 17 programs of each of eight heads, but there are 16 tiles of rows
        assert self.planned() == replace(outside, spans=16)

    def test_those_of_triton_are_different_and_fit_a_few_rows(self) -> None:
        decoding = problem("scaled", rows=1, keys=8192, dtype=torch.bfloat16)
        schedules = lookup("triton").schedules(decoding, HOPPER)
        assert len(set(schedules)) == len(schedules) > 8
        assert all(each.splits > 1 for each in schedules)
        assert all(math.log2(side).is_integer() and side >= 16 for s in schedules for side in (s.rows, s.keys))

    def test_gluon(self) -> None:
        of = problem("causal", rows=1024, keys=1024, dtype=torch.bfloat16)
        operands = (of.query.shape, of.key.shape, of.value.shape)
        assert measured_choices(of.spec, torch.bfloat16, *operands) is None
        # one that is measured without a panel may leave no room for one
        assert not lookup("gluon").schedules(problem("bias", dtype=torch.bfloat16), HOPPER)
        other = lookup("gluon").schedules(of, HOPPER)[-1]
        assert other in choices(64, 64)
        keep(HOPPER, {case_of(of): Measured({}, {"gluon": asdict(other)})})
        assert measured_choices(of.spec, torch.bfloat16, *operands) == other
