"""AttentionSpec: its text form, and every way in which a spec can be ill-formed."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnfuse.errors import BadProgram
from attnfuse.score import Const, Expr, Index, P, S, parse, walk
from attnfuse.spec import AttentionSpec, Captured, axes_of
from tests.support.programs import programs

KEYS = Captured(("b0", "n"), "bool")
HEADS = Captured(("h",), "float32")


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    """Well-formed specs whose programs mean nothing in particular."""
    batch, symbols = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    axes = (*(f"b{i}" for i in range(batch)), "h", "m", "n")
    some_axes = st.sets(st.sampled_from(axes)).map(lambda some: tuple(a for a in axes if a in some))
    captures = draw(
        st.lists(st.builds(Captured, some_axes, st.sampled_from(["bool", "int64", "bfloat16"])), max_size=3)
    )
    free = programs(score=False, indices=tuple(map(Index, axes)), captures=len(captures), symbols=symbols, leaves=4)
    sink = draw(st.none() | free)
    varies = sink is not None and "n" in axes_of(sink, captures)
    softmax = draw(st.booleans()) or (sink is not None and not varies)
    return AttentionSpec(
        score=draw(free | st.sampled_from([S, parse("where(n <= m, 0.5 * s, -inf)")])),
        weight=draw(free | st.just(P)),
        sink=None if varies else sink,
        dropout=draw(st.floats(0, 1)),
        captures=tuple(captures),
        batch=batch,
        symbols=symbols,
        normaliser="softmax" if softmax else "none",
        empty_rows=draw(st.sampled_from(["nan", "zero"])) if softmax else "nan",
        exact_scores=draw(st.booleans()),
    )


@given(specs())
def test_from_text_undoes_to_text(spec: AttentionSpec) -> None:
    assert AttentionSpec.from_text(spec.to_text()) == spec


@given(specs())
def test_a_spec_is_one_line_of_json_and_hashable(spec: AttentionSpec) -> None:
    assert "\n" not in spec.to_text()
    assert json.loads(spec.to_text())["batch"] == spec.batch
    assert hash(spec) == hash(AttentionSpec.from_text(spec.to_text()))


def test_plain_attention_is_the_default() -> None:
    spec = AttentionSpec()
    assert spec.axes == ("b0", "h", "m", "n")
    assert spec.to_text() == (
        '{"score": "s", "weight": "p", "sink": null, "dropout": 0.0, "captures": [], "batch": 1, "symbols": 0}'
    )


def test_facts_are_written_where_they_are_unusual() -> None:
    assert '"normaliser": "none"' in AttentionSpec(normaliser="none").to_text()
    assert '"empty_rows": "zero"' in AttentionSpec(empty_rows="zero").to_text()
    assert '"exact_scores": true' in AttentionSpec(exact_scores=True).to_text()


@pytest.mark.parametrize(
    "facts", [{"normaliser": "max"}, {"empty_rows": "one"}, {"normaliser": "none", "empty_rows": "zero"}]
)
def test_facts_that_do_not_exist_or_do_not_fit_are_refused(facts: dict[str, str]) -> None:
    with pytest.raises(BadProgram, match=r"is one of|neither sinks nor empty rows"):
        AttentionSpec.from_text(json.dumps({**json.loads(AttentionSpec().to_text()), **facts}))


def test_without_a_softmax_there_is_no_sink() -> None:
    with pytest.raises(BadProgram, match="neither sinks nor empty rows"):
        AttentionSpec(sink=Const(0.0), normaliser="none")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"score": "t0"}, "the score program reads t0, of 0 captures"),
        ({"score": "s * t2", "captures": (KEYS, HEADS)}, "the score program reads t2, of 2 captures"),
        ({"score": "where(n < z0, s, -inf)"}, "the score program reads z0, of 0 sizes"),
        ({"score": "s + float(b1)"}, "the score program reads index b1; there are b0, h, m, n"),
        ({"score": "s + float(b0)", "batch": 0}, "the score program reads index b0; there are h, m, n"),
        ({"score": "s * p"}, "the score program reads 'p'"),
        ({"weight": "p * s"}, "the weight program reads 's'"),
        ({"weight": "p * t0"}, "the weight program reads t0, of 0 captures"),
        ({"sink": "s"}, "the sink program reads 's'"),
        ({"sink": "p"}, "the sink program reads 'p'"),
        ({"sink": "float(n)"}, r"the sink 'float\(n\)' varies along the keys"),
        ({"sink": "t0", "captures": (KEYS,)}, "the sink 't0' varies along the keys"),
        ({"dropout": -0.1}, "dropout probability -0.1 is not between 0 and 1"),
        ({"dropout": float("nan")}, "dropout probability nan is not between 0 and 1"),
        ({"captures": (Captured(("q",), "bool"),)}, "a capture along .*q.*; its axes must be among"),
        ({"captures": (Captured(("n", "m"), "bool"),)}, "in that order"),
        ({"captures": (Captured(("m", "m"), "bool"),)}, "in that order"),
        ({"batch": -1}, "neither may be negative"),
        ({"symbols": -1}, "neither may be negative"),
    ],
)
def test_ill_formed_specs_say_why(fields: dict[str, Any], reason: str) -> None:
    parsed: dict[str, Any] = {name: parse(value) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(BadProgram, match=reason):
        AttentionSpec(**parsed)


@pytest.mark.parametrize(
    "source",
    ["", "{}", "[]", "null", "3", "s", '{"score": "s"}', "{" * 50, "[" * 100_000],
    ids=["empty", "no fields", "list", "null", "number", "program", "one field", "broken", "deep"],
)
def test_text_that_is_no_spec_is_refused(source: str) -> None:
    with pytest.raises(BadProgram, match="not an attention spec"):
        AttentionSpec.from_text(source)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score", 3), ("score", "s +"), ("score", None), ("sink", "n"), ("dropout", "often"), ("dropout", None),
        ("captures", [3]), ("captures", 3), ("captures", ["bool[q]"]), ("batch", "one"), ("batch", -2),
        ("symbols", None),
    ],
)  # fmt: skip
def test_each_broken_field_is_refused(name: str, value: object) -> None:
    fields = json.loads(AttentionSpec().to_text())
    with pytest.raises(BadProgram):
        AttentionSpec.from_text(json.dumps({**fields, name: value}))


@pytest.mark.parametrize(
    ("program", "axes"),
    [("0.5", ""), ("m - n", "mn"), ("t0", "b0 n"), ("t1 * float(m)", "h m"), ("z0", ""), ("s", "b0 h m n")],
)
def test_axes_of_names_what_a_program_varies_along(program: str, axes: str) -> None:
    expected = axes.split() if " " in axes else list(axes)
    assert axes_of(parse(program), (KEYS, HEADS)) == frozenset(expected)


@given(programs(captures=0, symbols=0))
def test_axes_of_covers_every_index(program: Expr) -> None:
    indices = {part.axis for part in walk(program) if isinstance(part, Index)}
    assert indices <= axes_of(program, ())


@given(specs())
def test_a_hash_is_kept_in_this_process_alone(spec: AttentionSpec) -> None:
    again = AttentionSpec.from_text(spec.to_text())
    assert hash(again) == hash(spec)
    # texts hash otherwise in another process
    copied = pickle.loads(pickle.dumps(spec))
    assert vars(copied).keys() == {each.name for each in fields(spec)}
    assert copied == spec
