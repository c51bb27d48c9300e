"""Where the kernel cannot run and what it cannot compute, in sentences; no Triton is needed to be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attnfuse.kernels import Kernel, Operand, Problem, Residual, lookup, registry
from attnfuse.kernels.gluon import hopper
from attnfuse.operands import Operands
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import COMMON, SIZES, SPECS, case

HOPPER = Target.parse("cuda:sm90")
HALF = Operand((2, 4, 512, 128), torch.bfloat16)
PLAIN = Problem(SPECS["scaled"], HALF, HALF, HALF)


@pytest.fixture
def gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed."""
    monkeypatch.setattr(hopper, "_missing", lambda: ())


def reasons(problem: Problem, target: Target = HOPPER) -> tuple[str, ...]:
    return lookup("gluon").reasons_against(problem, target)


@pytest.mark.usefixtures("gluon")
def test_plain_attention_is_not_refused() -> None:
    assert reasons(PLAIN) == ()


@pytest.mark.usefixtures("gluon")
def test_every_spec_of_one_batch_without_weights_or_dropout() -> None:
    refused = {name for name in COMMON if reasons(case(SPECS[name], SIZES["grouped heads"], torch.bfloat16).problem())}
    assert refused == {"weights squared", "dropout", "everything"}


@pytest.mark.usefixtures("gluon")
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(PLAIN, query=replace(HALF, dtype=torch.float32)), "one half type"),
        (replace(PLAIN, key=replace(HALF, dtype=torch.float16)), "one half type"),
        (replace(PLAIN, value=replace(HALF, shape=(2, 4, 512, 50))), "16 bytes at a time"),
        (replace(PLAIN, value=replace(HALF, shape=(2, 4, 512, 264))), "at most 256 wide"),
        (replace(PLAIN, spec=AttentionSpec(parse("s"), dropout=0.5)), "no dropout"),
        (replace(PLAIN, spec=AttentionSpec(parse("s"), parse("p * p"))), "no weight program"),
        (replace(PLAIN, spec=AttentionSpec(parse("s"), batch=2)), "one batch dimension"),
        (replace(PLAIN, spec=AttentionSpec(parse("s ** s"))), "raises to a power"),
    ],
)
def test_what_it_cannot_compute(problem: Problem, reason: str) -> None:
    assert any(reason in each for each in reasons(problem)), reasons(problem)


@pytest.mark.usefixtures("gluon")
@pytest.mark.parametrize("target", ["cuda", "cuda:sm80", "cuda:sm100"])
def test_only_on_hopper(target: str) -> None:
    (reason,) = reasons(PLAIN, Target.parse(target))
    assert "sm90" in reason
    assert target in reason


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(hopper, "import_module", absent)
    hopper._missing.cache_clear()
    (reason,) = reasons(PLAIN)
    hopper._missing.cache_clear()
    assert "Triton with Gluon is not installed" in reason


def test_a_gluon_of_other_names_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "import_module", lambda name: object())
    hopper._missing.cache_clear()
    (reason,) = reasons(PLAIN)
    hopper._missing.cache_clear()
    assert "has no warp_specialize" in reason


class Backward(Kernel):
    """Stands in for the kernel whose backward is used."""

    name = "triton"
    devices = ("cuda",)

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        return ("it is Friday",) if problem.keys == 511 else ()

    def cost(self, problem: Problem, target: Target) -> float:
        return 3.0 if problem.training else 1.0

    def run(self, *operands: object) -> torch.Tensor:
        raise AssertionError("the forward is ours")

    def backward(self, *operands: object) -> tuple[torch.Tensor | None, ...]:
        return (None, torch.ones(1), None)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("gluon", "deterministic")
def test_a_backward_that_is_declined_is_that_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KERNELS, "triton", Backward())
    training = replace(PLAIN, value=replace(HALF, requires_grad=True))
    assert reasons(training) == ()
    kernel = lookup("gluon")
    assert kernel.cost(training, HOPPER) == pytest.approx(kernel.cost(PLAIN, HOPPER) + 2.0)
    operand = torch.ones(1, 1, 1, 8)
    residual = Residual(operand, torch.ones(1, 1, 1))
    found = kernel.backward(PLAIN.spec, operand, Operands(operand, operand, operand), (), residual)
    assert found == (None, torch.ones(1), None)
    short = replace(HALF, shape=(2, 4, 511, 128))
    assert reasons(replace(training, key=short)) == ("its backward is that of triton: it is Friday",)


def test_why_a_backward_is_declined() -> None:
    wide, shared = (2, 4, 512, 192), (1, 4, 512, 128)
    assert hopper.declined(HALF.shape, HALF.shape, HALF.shape) == ()
    (reason,) = hopper.declined(wide, wide, HALF.shape)
    assert "128 at most, not 192" in reason
    (reason,) = hopper.declined(HALF.shape, shared, shared)
    assert "a batch of their own" in reason


@pytest.mark.usefixtures("deterministic")
def test_a_sum_in_no_order_is_not_deterministic() -> None:
    (reason,) = hopper.declined(HALF.shape, HALF.shape, HALF.shape)
    assert "in no order" in reason


@pytest.mark.usefixtures("gluon")
def test_a_backward_costs_its_five_products() -> None:
    long = Operand((1, 16, 16384, 128), torch.bfloat16)
    forward = Problem(PLAIN.spec, long, long, long)
    both = replace(forward, query=replace(long, requires_grad=True))
    kernel = lookup("gluon")
    assert 3.5 < kernel.cost(both, HOPPER) / kernel.cost(forward, HOPPER) < 4.5


def test_a_causal_mask_costs_half() -> None:
    long = Operand((1, 16, 16384, 128), torch.bfloat16)
    full, causal = (Problem(SPECS[name], long, long, long) for name in ("scaled", "causal"))
    kernel = lookup("gluon")
    assert 0.45 < kernel.cost(causal, HOPPER) / kernel.cost(full, HOPPER) < 0.6


E4M3 = torch.float8_e4m3fn
NARROW = Operand((2, 4, 512, 128), E4M3)
ROUNDED = AttentionSpec(parse("0.1 * s"), weight_dtype="float8_e4m3fn", out_dtype="bfloat16")
FLOAT8 = Problem(ROUNDED, NARROW, NARROW, replace(NARROW, minor="n"))


@pytest.mark.usefixtures("gluon")
def test_float8_is_not_refused() -> None:
    assert reasons(FLOAT8) == ()
    assert reasons(replace(FLOAT8, value=NARROW)) == ()
    scaled = replace(ROUNDED, weight=parse("0.5 * p"))
    assert reasons(replace(FLOAT8, spec=scaled)) == ()


@pytest.mark.usefixtures("gluon")
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(FLOAT8, spec=replace(ROUNDED, weight_dtype=None)), "weights that may be rounded"),
        (replace(FLOAT8, spec=replace(ROUNDED, out_dtype="float32")), "an output of a half type"),
        (replace(FLOAT8, query=HALF), "query and key of one type"),
        (replace(FLOAT8, key=replace(NARROW, dtype=torch.float8_e5m2)), "query and key of one type"),
        (replace(FLOAT8, query=replace(NARROW, shape=(2, 4, 512, 72))), "16 bytes at a time"),
        (replace(FLOAT8, value=replace(NARROW, shape=(2, 4, 512, 256))), "at most 128 wide"),
        (replace(FLOAT8, query=replace(NARROW, requires_grad=True)), "its backward is that of triton"),
    ],
)
def test_what_it_cannot_compute_of_float8(problem: Problem, reason: str) -> None:
    assert any(reason in each for each in reasons(problem)), reasons(problem)


@pytest.mark.usefixtures("gluon")
def test_float8_is_ahead_and_wants_value_transposed() -> None:
    """A value that lies as it is is copied first, which may take as long as the rest."""
    own, other = ([lookup(name).cost(replace(FLOAT8, value=value), HOPPER) for value in (NARROW, FLOAT8.value)]
                  for name in ("gluon", "triton"))  # fmt: skip
    assert own[1] < own[0]
    assert own[1] < other[1]
    assert {each.overlapped for each in lookup("gluon").schedules(FLOAT8, HOPPER)} == {True, False}
