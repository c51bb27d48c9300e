"""Random programs and near misses, a few always, and as many as a night holds under ``--hypothesis-profile=night``."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from tests.property import recipe as parts
from tests.property import search
from tests.property.judge import Data, exact_result, inputs_of, otherwise_rounded
from tests.property.menu import Spelling
from tests.property.misses import changed, ways
from tests.property.recipe import Recipe, Sizes
from tests.property.spell import Spelled, spell
from tests.property.strategies import recipes, sizes, spellings
from tests.support.compare import assert_as_good
from tests.support.record import recorded

#: How many one test tries: a failing test names its seed, and repeats in minutes.
CHUNK = 200
#: How many are tried by day.
FEW = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first_seed" not in metafunc.fixturenames:
        return
    config, kind = metafunc.config, "misses" if "near" in metafunc.function.__name__ else "programs"
    number = config.getoption(f"--night-{kind}") if _by_night() else FEW
    start = config.getoption("--night-seed") if _by_night() else 0
    chunk = min(CHUNK, number)
    metafunc.parametrize(("number", "first_seed"), [(chunk, start + at) for at in range(-(-number // chunk))])


def _by_night() -> bool:
    return settings().max_examples > 100


def test_random_programs(number: int, first_seed: int, record_property: Callable[[str, object], None]) -> None:
    record_property("tally", ("programs", *_numbers(search.programs(number, 1000 * first_seed))))


def test_near_misses(number: int, first_seed: int, record_property: Callable[[str, object], None]) -> None:
    record_property("tally", ("near misses", *_numbers(search.near_misses(number, 1000 * first_seed))))


def _numbers(tally: search.Tally) -> tuple[int, int, int]:
    assert not tally.stopped, "a rewrite was stopped by its own certificate alone: lift or simplify is wrong"
    return tally.tried, tally.fused, tally.stopped


#: A bias, a window and a mask whose -10000.0 is added: two logits of a row, rounded by 5e-4, and by luck alike.
ADDED_FILL = (
    Recipe(
        Sizes(batch=(3,), heads=1, kv_heads=1, rows=2, keys=2, depth=1, value_depth=1),
        scale=0.3,
        biases=(parts.bias("b", "h", "m", "n"),),
        masks=(parts.window(-1), parts.allowed("b", "m", "n")),
        fill=-1e4,
        added=True,
    ),
    Spelling(
        arrive="packed unflattened",
        product="turned einsum",
        key_t="transpose",
        scale="div_",
        terms=("whole", ">", "unsqueezed"),
        apply="added inverted",
        softmax="shifted",
        dropout="p = 0",
        weighted="turned",
        leave="contiguous",
    ),
    Data(empty_rows=True, seed=1),
)


def test_luck_of_a_source_is_no_yardstick() -> None:
    search.try_program(*ADDED_FILL, search.Tally())


@pytest.mark.parametrize("wrong", [{"scale": 0.29}, {"biases": ()}])
def test_other_roundings_excuse_no_other_program(wrong: dict[str, Any]) -> None:
    recipe, spelling, made_of = ADDED_FILL
    spelled, inputs = spell(recipe, spelling), inputs_of(recipe, made_of)
    args = spelled.arguments(inputs)
    (exact, empty), (other, _) = (exact_result(each, inputs) for each in (spelled, _changed(spelled, wrong)))
    source, other = spelled.module(*args)[empty], other.float()[empty]
    moved = otherwise_rounded(spelled, args, empty)
    assert_as_good(exact.float()[empty], source, exact[empty], moved=moved)
    with pytest.raises(AssertionError, match="what other roundings do"):
        assert_as_good(other, source, exact[empty], moved=moved)


def _changed(spelled: Spelled, wrong: dict[str, Any]) -> Spelled:
    return replace(spelled, recipe=replace(spelled.recipe, **wrong))


@given(st.data())
@settings(max_examples=max(20, settings().max_examples // 40))
def test_a_program_is_recorded_as_it_is_traced(data: st.DataObject) -> None:
    recipe = data.draw(recipes(sizes()))
    spelled = spell(recipe, data.draw(spellings(recipe)))
    args = spelled.arguments(recipe.inputs())
    with torch.no_grad():
        traced = make_fx(spelled.module, tracing_mode="fake", pre_dispatch=True)(*(x.clone() for x in args))
    ours = recorded(spelled.module, [x.clone() for x in args])
    for node, theirs in zip(ours.graph.nodes, traced.graph.nodes, strict=True):
        assert node.format_node() == theirs.format_node()
        if isinstance(value := theirs.meta.get("val"), torch.Tensor):
            assert (node.meta["val"].shape, node.meta["val"].dtype) == (value.shape, value.dtype)


SOURCE = """def attention(q, k, v):
    keep = torch.ones(M, N, dtype=torch.bool).tril(0)
    return torch.softmax((q @ k.mT * 0.5).masked_fill(~keep, float('-inf')), dim=-1) @ v
"""


def test_a_near_miss_differs_in_one_thing() -> None:
    made = {changed(SOURCE, way) for way in range(ways(SOURCE))}
    assert ast.unparse(ast.parse(SOURCE)) not in made
    assert len(made) == ways(SOURCE)
    for expected in (
        "triu(0)",
        "tril(1)",
        "k.mT * -0.5",
        "float('inf')",
        "dim=-2)",
        "(k @ k.mT",
        "sigmoid",
        "dtype=torch.bool",
    ):
        assert any(expected in source for source in made), expected
