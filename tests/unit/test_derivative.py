"""Pullbacks of score programs against torch's autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnfuse.derivative import pullback
from attnfuse.reference import Scope, evaluate
from attnfuse.score import ARITY, Capture, Expr, P, S, parse, text

POINTS = torch.tensor([[[[-1.7, -0.4, 0.0, 0.3, 1.0, 2.6]]]], dtype=torch.float64)
POSITIVE = POINTS.abs() + 0.1
WITHOUT = {"not", "sign", "floor", "ceil", "isnan", "isinf", "int", "bool", "floordiv", "where",
           "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor"}  # fmt: skip
ONLY_POSITIVE = {"log", "sqrt", "rsqrt", "pow", "log1p"}


def scope(score: torch.Tensor, capture: torch.Tensor) -> Scope:
    spans = tuple((0, size) for size in score.shape)
    return Scope(spans, [capture], (), torch.float64, score.device, score=score)


def check(program: Expr, score: torch.Tensor, capture: torch.Tensor) -> None:
    """Every leaf's pullback equals autograd's gradient."""
    score, capture = score.clone().requires_grad_(), capture.clone().requires_grad_()
    grad = torch.randn_like(score)
    value = evaluate(program, scope(score, capture))
    true = torch.autograd.grad(value, [score, capture], grad.expand_as(value), allow_unused=True)
    given = replace(scope(score.detach(), capture.detach()), weight=grad)
    for leaf, expected in zip((S, Capture(0)), true, strict=True):
        pulled = pullback(program).get(leaf)
        assert (pulled is None) == (expected is None), text(program)
        if pulled is not None and expected is not None:
            torch.testing.assert_close(evaluate(pulled, given).expand_as(expected), expected)


@pytest.mark.parametrize("op", sorted(set(ARITY) - WITHOUT))
def test_every_smooth_operation(op: str) -> None:
    points = POSITIVE if op in ONLY_POSITIVE else POINTS
    points = points + 0.05 if op == "reciprocal" else points
    other = POSITIVE.flip(-1) + 0.3
    args = ("s",) if ARITY[op] == 1 else ("s", "t0")
    check(parse(f"{op}({', '.join(args)})"), points, other)
    if len(args) == 2:
        check(parse(f"{op}(t0, s)"), points.abs() + 0.2, other)


@pytest.mark.parametrize(
    "program",
    ["s * s", "where(n <= 2, 0.5 * s, -inf)", "3.0 * tanh(s / 3.0) + t0 * (n - m)", "where(s > 0, s, t0 * s)",
     "min(s, t0) + max(s, 0.3)", "where(n < 3, t0, s)", "s + 0.0 * float(floor(s))", "float(n) * t0"],
)  # fmt: skip
def test_whole_programs(program: str) -> None:
    check(parse(program), POINTS, POSITIVE)


def test_a_gradient_of_nan_stops_at_a_mask() -> None:
    pulled = pullback(parse("where(n <= 2, 0.5 * s, -inf)"))[S]
    given = replace(scope(POINTS, POSITIVE), weight=torch.full_like(POINTS, float("nan")))
    assert evaluate(pulled, given).isnan().flatten().tolist() == [True] * 3 + [False] * 3


def test_a_program_of_weights_reads_its_gradient_as_s() -> None:
    assert pullback(parse("p * 2.0")) == {P: parse("s * 2.0")}


def test_integers_and_comparisons_pass_no_gradient() -> None:
    assert S not in pullback(parse("float(s < 1.0) + floor(s)"))
