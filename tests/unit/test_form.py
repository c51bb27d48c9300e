"""Forms: the canonical shape of a program as data, and the names of its parts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnfuse.features import describe, features
from attnfuse.form import Form, form_of, masked_by, weight_factor
from attnfuse.score import Apply, Const, Expr, apply, parse, text
from attnfuse.spec import AttentionSpec, Captured
from tests.support.programs import programs

#: What a form is made of never reads the score.
FREE = programs(score=False, leaves=4)
CAPTURES = (
    Captured(("b0", "n"), "bool"),
    Captured(("h", "m", "n"), "float32"),
    Captured(("h",), "float32"),
    Captured(("b0", "m"), "int64"),
    Captured(("b0", "n"), "int64"),
    Captured(("b0", "h", "m", "n"), "bool"),
)


def _is_no_conjunction(program: Expr) -> bool:
    return not (isinstance(program, Apply) and program.op == "and")


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """A conjunct is no conjunction, and only a mask has a fill."""
    keep = tuple(draw(st.lists(FREE.filter(_is_no_conjunction), max_size=3)))
    return Form(
        scale=draw(FREE),
        softcap=draw(st.none() | st.floats(allow_nan=False)),
        bias=tuple(draw(st.lists(FREE, max_size=3))),
        keep=keep,
        fill=draw(st.floats(allow_nan=False)) if keep else float("-inf"),
    )


@pytest.mark.parametrize(
    ("score", "facts", "words"),
    [
        ("where(n <= m, sigmoid(s), 0.0)", {"normaliser": "none"}, "no softmax, program, causal"),
        ("where(n <= m, 0.5 * s, 0.0)", {"normaliser": "none"}, "no softmax, scale 0.5, causal"),
        ("where(n <= m, s * s, -inf)", {"empty_rows": "zero"}, "program, causal, empty rows zero"),
    ],
)
def test_facts_are_described(score: str, facts: dict[str, Any], words: str) -> None:
    assert describe(AttentionSpec(parse(score), **facts)) == words


@pytest.mark.parametrize(
    ("score", "normaliser", "masks"),
    [
        ("where(n <= m, s * s, -inf)", "softmax", True),
        ("where(n <= m, s, 0.0)", "none", True),
        ("where(n <= m, s, -inf)", "none", False),
        ("where(s > 0, s, 0.0)", "none", False),
        ("s", "none", False),
    ],
)
def test_a_mask_is_what_leaves_a_key_without_weight(score: str, normaliser: Any, masks: bool) -> None:
    assert (masked_by(AttentionSpec(parse(score), normaliser=normaliser)) is not None) == masks


@given(forms())
def test_form_of_undoes_expr(form: Form) -> None:
    assert form_of(form.expr()) == form


@given(programs(leaves=6))
def test_a_program_with_a_form_is_the_program_of_its_form(program: Expr) -> None:
    form = form_of(program)
    assert form is None or form_of(form.expr()) == form


@pytest.mark.parametrize(
    "program",
    [
        "0.5", "s + s", "s * 0.5", "exp(s)", "where(s > 0, s, -inf)", "where(n <= m, s, t0)",
        "where(n <= m, s * s, -inf)", "30.0 * tanh(s / 20.0)", "(s + t1) * 0.5", "where(n <= m, -inf, s)",
    ],
)  # fmt: skip
def test_other_programs_have_no_form(program: str) -> None:
    assert form_of(parse(program)) is None
    assert features(AttentionSpec(score=parse(program), captures=CAPTURES)) is None


@pytest.mark.parametrize(
    ("score", "named"),
    [
        ("s", "plain"),
        ("0.125 * s", "scale 0.125"),
        ("t2 * s", "scale"),
        ("30.0 * tanh(s / 30.0)", "softcap 30"),
        ("s + t1", "bias"),
        ("s + t2 * float(n)", "alibi"),
        ("s + t2 * float(n - m)", "alibi"),
        ("where(n <= m, s, -inf)", "causal"),
        ("where(n <= m + 3, s, -inf)", "causal 3"),
        ("where(n <= m - 3, s, -inf)", "causal -3"),
        ("where(n <= m + (z1 - z0), s, -inf)", "causal z1 - z0"),
        ("where(n >= m - 3, s, -inf)", "window -3"),
        ("where(n >= m, s, -inf)", "window 0"),
        ("where(t0, s, -inf)", "padding"),
        ("where(t3 == t4, s, -inf)", "document"),
        ("where(t4 == t3, s, -inf)", "document"),
        ("where(t5, s, -inf)", "predicate"),
        ("where(t4 == t4, s, -inf)", "padding"),
        ("where(n <= m + n, s, -inf)", "predicate"),
        ("where((n <= m) & (n >= m - 3) & t0, s, -inf)", "causal, window -3, padding"),
        (
            "where((n <= m) & t0, 30.0 * tanh(0.5 * s / 30.0) + t1, -1e9)",
            "scale 0.5, softcap 30, bias, causal, padding",
        ),
        ("exp(s)", "program"),
    ],
)
def test_parts_are_named_in_the_order_they_act(score: str, named: str) -> None:
    assert describe(AttentionSpec(score=parse(score), captures=CAPTURES, symbols=2)) == named


def test_sinks_and_dropout_come_last() -> None:
    spec = AttentionSpec(score=parse("0.5 * s"), sink=parse("t2"), dropout=0.1, captures=CAPTURES)
    assert describe(spec) == "scale 0.5, sink, dropout 0.1"


@given(forms())
def test_the_text_of_a_form_reads_back(form: Form) -> None:
    assert form_of(parse(text(form.expr()))) == form


def test_scale_one_is_not_written() -> None:
    assert text(Form(scale=Const(1.0)).expr()) == "s"
    assert form_of(apply("mul", Const(1), parse("s"))) == Form(scale=Const(1))


@pytest.mark.parametrize(
    ("weight", "factor"),
    [("p", "1.0"), ("p * t0", "t0"), ("t0 * p", "t0"), ("0.5 * (p * t0)", "0.5 * t0"), ("p * p", ""), ("exp(p)", "")],
)
def test_what_a_weight_is_multiplied_by_stands_on_either_side(weight: str, factor: str) -> None:
    found = weight_factor(parse(weight))
    assert found == (parse(factor) if factor else None)
