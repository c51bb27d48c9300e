"""The search that a night is for: random programs and near misses, each traced, rewritten, and held to float64.

Programs are recorded as ATen graphs, without Dynamo or export, so that one costs some hundredths of a second; the
doors have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import Phase, given, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from attnfuse import fuse_graph
from attnfuse.report import Report
from tests.property.judge import DATA, Data, exact_result, inputs_of, otherwise_rounded, representable
from tests.property.menu import Spelling
from tests.property.misses import changed, ways
from tests.property.recipe import Recipe
from tests.property.spell import Spelled, spell
from tests.property.strategies import recipes, sizes, spellings
from tests.support.compare import assert_as_good
from tests.support.record import recorded

__all__ = ["Tally", "near_misses", "programs", "try_program"]


@dataclass
class Tally:
    """How many programs were tried, how many of them fused, and how many rewrites only the certificate stopped."""

    tried: int = 0
    fused: int = 0
    stopped: int = 0

    def note(self, report: Report) -> None:
        """Counts one program."""
        self.tried += 1
        self.fused += bool(report.fused)
        self.stopped += any("bug of attnfuse" in site.reason for site in report.refused)


def programs(number: int, start: int) -> Tally:
    """Tries ``number`` random spellings of random attention, drawn from the seed ``start``; fails at a wrong answer."""
    return _search(number, start, _try_program)


def near_misses(number: int, start: int) -> Tally:
    """Tries ``number`` of them with one thing changed; what then does not run is not counted."""
    return _search(number, start, _try_near_miss)


def _search(number: int, start: int, attempt: Callable[[st.DataObject, Tally], None]) -> Tally:
    tally = Tally()
    while tally.tried < number:
        _drawn(number - tally.tried, start, lambda data: attempt(data, tally))
        start += 1
    return tally


def _drawn(number: int, start: int, attempt: Callable[[st.DataObject], None]) -> None:
    @seed(start)
    @settings(max_examples=number, derandomize=False, database=None, phases=[Phase.generate, Phase.shrink])
    @given(st.data())
    def run(data: st.DataObject) -> None:
        attempt(data)

    run()


def _try_program(data: st.DataObject, tally: Tally) -> None:
    made_of = data.draw(DATA)
    recipe = representable(data.draw(recipes(sizes(zero=True))), made_of.dtype)
    try_program(recipe, data.draw(spellings(recipe)), made_of, tally)


def try_program(recipe: Recipe, spelling: Spelling, made_of: Data, tally: Tally) -> None:
    """Rewrites one program, and fails where it then computes something else."""
    spelled = spell(recipe, spelling)
    inputs = inputs_of(recipe, made_of)
    args = spelled.arguments(inputs)
    source = spelled.module(*_copies(args))
    fused = _rewritten(spelled, args, tally)
    exact, empty = exact_result(spelled, inputs)
    for rows in (empty, ~empty):
        assert_as_good(fused[rows], source[rows], exact[rows], moved=otherwise_rounded(spelled, args, rows))


def _try_near_miss(data: st.DataObject, tally: Tally) -> None:
    made_of = data.draw(DATA)
    recipe = representable(data.draw(recipes()), made_of.dtype)
    spelling = data.draw(spellings(recipe))
    spelled = spell(recipe, spelling)
    way = data.draw(st.integers(0, ways(spelled.source) - 1))
    spelled = replace(spelled, source=changed(spelled.source, way))
    if "new_empty" in spelled.source:
        reject()  # a factor of zero may have become one
    inputs = inputs_of(recipe, made_of)
    args = spelled.arguments(inputs)
    source = _answer(spelled, args)
    fused = _rewritten(spelled, args, tally)
    wide = spell(recipe, spelling, wide=torch.float64)
    wide = replace(wide, source=changed(wide.source, way))
    exact = _answer(wide, wide.arguments(inputs.to(torch.float64)))
    if source.is_floating_point():
        assert_as_good(fused, source, exact, moved=otherwise_rounded(spelled, args))
    else:
        assert torch.equal(fused, source)


def _answer(spelled: Spelled, args: tuple[Tensor, ...]) -> Tensor:
    """What a changed program computes; it is rejected where it raises, or gives something else each time."""
    try:
        first, second = (spelled.module(*_copies(args)) for _ in range(2))
    except Exception:  # noqa: BLE001 - what a changed program raises is its own affair
        reject()
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        reject()
    return first


def _rewritten(spelled: Spelled, args: tuple[Tensor, ...], tally: Tally) -> Tensor:
    graph = recorded(spelled.module, _copies(args))
    report = fuse_graph(graph, profit=False).meta["attnfuse_report"]
    tally.note(report)
    return graph(*_copies(args))


def _copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in args)
