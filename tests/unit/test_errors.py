"""Errors: one sentence each, and well-behaved as Python exceptions."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator

import pytest

from attnfuse.errors import AttnfuseError, BadInput, BadProgram, NoKernel, NotEquivalent, Refused


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (Refused("a dimension is empty"), "a dimension is empty"),
        (Refused("a dimension is empty", "mm"), "a dimension is empty [mm]"),
        (Refused("a dimension is empty", "mm", "a.py:3, q @ k"), "a dimension is empty [mm at a.py:3, q @ k]"),
        (Refused("the weights escape", "p", remedy="drop them"), "the weights escape [p]; drop them"),
        (Refused("the weights escape", source="a.py:3"), "the weights escape"),
    ],
)
def test_a_refusal_is_a_sentence_with_its_place_and_remedy(refusal: Refused, sentence: str) -> None:
    assert str(refusal) == sentence


@pytest.mark.parametrize("error", [BadInput, BadProgram, NoKernel, NotEquivalent, Refused])
def test_one_base_catches_every_error(error: Callable[[str], AttnfuseError]) -> None:
    with pytest.raises(AttnfuseError, match="why"):
        raise error("why")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_refusal_survives_copying(again: Callable[[Refused], Refused]) -> None:
    refusal = Refused(reason="no", node="mm", remedy="yes")
    assert again(refusal) == refusal


def test_a_refusal_passes_through_context_managers() -> None:
    @contextlib.contextmanager
    def stage() -> Iterator[None]:
        yield

    with pytest.raises(Refused, match="no"), stage():
        raise Refused("no")


def test_refusals_are_values() -> None:
    assert len({Refused("no", "a"), Refused("no", "a"), Refused("no", "b")}) == 2
