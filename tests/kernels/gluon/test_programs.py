"""Which programs a body runs where, and in which order its work is done; no Triton is needed."""

from __future__ import annotations

import pytest

from attnfuse.kernels.gluon.programs import programs_of
from attnfuse.kernels.rows import Band
from attnfuse.score import text
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import MIN, spec

DOCUMENTS = spec("where((n <= m) & (t0 == t1), 0.5 * s, -inf)", "int32[b0,m]", "int32[b0,n]")
FILLED = spec(f"where((n <= m) & t0, 0.5 * s, {MIN})", "bool[b0,n]")
ADDED = spec(f"0.5 * s + t1 + where(t0, 0.0, {MIN})", "bool[b0,m,n]", "float32[h]")


def texts(given: AttentionSpec) -> tuple[str, str, str | None]:
    found = programs_of(given, 2048, 2048, ())
    return text(found.cut), text(found.bare), None if found.mask is None else text(found.mask)


def test_a_mask_beside_a_band_is_listed() -> None:
    assert texts(DOCUMENTS) == ("where(t0 == t1, s, -inf)", "s", "t0 == t1")
    found = programs_of(DOCUMENTS, 2048, 2048, ())
    assert found.band == Band(None, 0, exact=False)
    assert not found.everywhere


def test_behind_a_finite_fill_rows_may_keep_nothing() -> None:
    assert texts(FILLED) == (f"where((n <= m) & t0, 0.5 * s, {MIN})", "0.5 * s", "(n <= m) & t0")
    found = programs_of(FILLED, 2048, 2048, ())
    assert found.band.open
    assert found.everywhere
    assert texts(ADDED)[1:] == ("0.5 * s + t1", "t0")


@pytest.mark.parametrize(
    "score",
    ["0.5 * s", "where(n <= m, 0.5 * s, -inf)", "where((n <= m) & (n >= m - 9), s, -inf)", "where(n < 5, s, 1.0)"],
)
def test_bands_and_mild_fills_need_no_lists(score: str) -> None:
    found = programs_of(spec(score), 2048, 2048, ())
    assert found.mask is None
    assert found.bare == found.cut


def test_programs_without_a_form_have_a_mask_all_the_same() -> None:
    found = programs_of(
        spec("where((n <= m) & (t0 == t1), tanh(0.5 * s), -inf)", *("int32[b0,m]", "int32[b0,n]")), 9, 9, ()
    )
    assert found.band == Band(None, 0, exact=False)
    assert (text(found.cut), text(found.bare)) == ("where(t0 == t1, tanh(0.5 * s), -inf)", "tanh(0.5 * s)")


def test_an_offset_that_is_captured_is_no_edge() -> None:
    assert texts(spec("where(n <= m + t0, 0.5 * s, -inf)", "int64[b0]")) == (
        "where(n <= m + t0, s, -inf)",
        "s",
        "n <= m + t0",
    )
