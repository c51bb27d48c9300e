"""Score programs: the text form is a faithful one, and what is no program is refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attnfuse.errors import BadProgram
from attnfuse.score import (
    ARITY,
    Apply,
    Capture,
    Const,
    Expr,
    Index,
    P,
    S,
    Symbol,
    apply,
    parse,
    rewrite,
    text,
    walk,
)
from tests.support.programs import constants, programs

NEGATIVE = Const(-2.0)


@given(programs())
@example(apply("pow", apply("neg", S), Const(2)))
@example(apply("neg", apply("pow", Const(2), S)))
@example(apply("neg", Const(2.5)))
@example(apply("neg", Const(True)))
@example(apply("pow", NEGATIVE, NEGATIVE))
@example(apply("sub", S, apply("sub", S, S)))
@example(apply("lt", apply("lt", S, P), apply("or", S, P)))
@example(apply("not", apply("and", apply("le", Index("n"), Index("m")), Capture(12))))
@example(Const(-0.0))
@example(Const(float("nan")))
@example(Const(float("-inf")))
def test_parse_undoes_text(program: Expr) -> None:
    assert parse(text(program)) == program


@given(programs())
def test_text_is_one_line_and_a_fixed_point(program: Expr) -> None:
    line = text(program)
    assert "\n" not in line
    assert text(parse(line)) == line


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (apply("where", apply("le", Index("n"), Index("m")), S, Const(float("-inf"))), "where(n <= m, s, -inf)"),
        (apply("mul", apply("add", S, Capture(0)), Const(0.125)), "(s + t0) * 0.125"),
        (apply("and", apply("lt", Index("n"), Symbol(1)), Capture(0)), "(n < z1) & t0"),
        (apply("tanh", apply("div", S, Const(30.0))), "tanh(s / 30.0)"),
        (apply("sub", S, apply("neg", Index("b0"))), "s - -b0"),
    ],
)
def test_text_reads_as_python(program: Expr, line: str) -> None:
    assert text(program) == line


@pytest.mark.parametrize(
    "source",
    [
        "", "s +", "s; s", "x", "s.t", "s[0]", "lambda: s", "'s'", "1j", "None", "not s", "s and p", "s if p else s",
        "0 < n < m", "s @ p", "frobnicate(s)", "where(s, p)", "where(*s)", "tanh(x=s)", "tanh()", "t", "tx", "b", "z-",
        "s = p", "(s, p)", "__import__('os')", "s\0", "\ud800", "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_program_is_refused(source: str) -> None:
    with pytest.raises(BadProgram):
        parse(source)


@pytest.mark.parametrize("source", ["(" * 500 + "s" + ")" * 500, "-" * 100_000 + "s"], ids=["brackets", "signs"])
def test_text_too_deep_to_read_is_refused(source: str) -> None:
    with pytest.raises(BadProgram):
        parse(source)


@given(st.text(max_size=12))
def test_random_text_is_a_program_or_is_refused(source: str) -> None:
    try:
        program = parse(source)
    except BadProgram:
        return
    assert parse(text(program)) == program


def test_a_refusal_names_what_was_not_understood() -> None:
    with pytest.raises(BadProgram, match="unknown name 'frob' in a score program"):
        parse("s + frob")
    with pytest.raises(BadProgram, match="no operation 'where' with 2 arguments"):
        parse("where(s, p)")


@pytest.mark.parametrize("op", ARITY)
def test_apply_checks_the_number_of_arguments(op: str) -> None:
    assert apply(op, *[S] * ARITY[op]) == Apply(op, (S,) * ARITY[op])
    with pytest.raises(BadProgram, match=op):
        apply(op, *[S] * (ARITY[op] + 1))


@given(constants(), constants())
def test_literals_of_different_types_are_different(left: Const, right: Const) -> None:
    assert (left == right) == (type(left.value) is type(right.value) and text(left) == text(right))
    assert left != right or hash(left) == hash(right)


@pytest.mark.parametrize(("left", "right"), [(1, 1.0), (1, True), (0.0, -0.0), (0, False)])
def test_equal_numbers_may_be_different_literals(left: float, right: float) -> None:
    assert Const(left) != Const(right)


@given(programs())
def test_walk_visits_parents_before_their_parts(program: Expr) -> None:
    parts = list(walk(program))
    assert parts[0] == program
    assert len(parts) == 1 + sum(len(part.args) for part in parts if isinstance(part, Apply))


@given(programs())
def test_rewriting_nothing_changes_nothing(program: Expr) -> None:
    assert rewrite(program, lambda part: part) == program


def test_rewrite_works_from_the_inside_out() -> None:
    def halve(part: Expr) -> Expr:
        match part:
            case Apply("add", (Const(left), Const(right))):
                return Const(left + right)
        return part

    assert rewrite(parse("(1 + 2) + (3 + 4)"), halve) == Const(10)
