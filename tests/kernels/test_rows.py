"""Bands and the proof that every row keeps a key, against masks written out in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse.kernels.rows import Band, band_of, rows_kept
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec, Captured
from tests.kernels.cases import MIN, SPECS

EDGES = st.none() | st.integers(-9, 9)
LENGTHS = st.integers(1, 12)


def mask(band: Band, rows: int, keys: int) -> torch.Tensor:
    m, n = torch.arange(rows)[:, None], torch.arange(keys)[None]
    inside = torch.ones(rows, keys, dtype=torch.bool)
    if band.left is not None:
        inside &= n >= m + band.left
    if band.right is not None:
        inside &= n <= m + band.right
    return inside


def spec_of(band: Band) -> AttentionSpec:
    terms = [f"(n >= m + {band.left})"] if band.left is not None else []
    terms += [f"(n <= m + {band.right})"] if band.right is not None else []
    return AttentionSpec(parse(f"where({' & '.join(terms)}, s, -inf)" if terms else "s"))


@given(EDGES, EDGES, LENGTHS, LENGTHS)
def test_rows_kept_is_what_the_mask_says(left: int | None, right: int | None, rows: int, keys: int) -> None:
    band = Band(left, right)
    assert rows_kept(spec_of(band), rows, keys) == bool(mask(band, rows, keys).any(dim=-1).all())


@given(EDGES, EDGES, LENGTHS, LENGTHS, st.data())
def test_reach_holds_every_kept_key_and_core_only_kept_ones(
    left: int | None, right: int | None, rows: int, keys: int, data: st.DataObject
) -> None:
    band = Band(left, right)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    block = mask(band, rows, keys)[first:last]
    start, stop = band.reach(first, last, keys)
    assert 0 <= start < stop <= keys
    assert not block[:, :start].any()
    assert not block[:, stop:].any()
    start, stop = band.core(first, last, keys)
    assert 0 <= start <= stop <= keys
    assert block[:, start:stop].all()


@given(EDGES, EDGES)
def test_the_band_of_a_spec(left: int | None, right: int | None) -> None:
    band = Band(left, right)
    assert band_of(spec_of(band)) == band


def test_symbolic_offsets_count_at_the_sizes_given() -> None:
    spec = AttentionSpec(parse("where(n <= m + (z1 - z0), s, -inf)"), symbols=2)
    assert band_of(spec, (3, 8)) == Band(None, 5)
    assert band_of(spec) == Band(exact=False)
    assert rows_kept(spec, 3, 8, (3, 8))
    assert not rows_kept(spec, 8, 3, (8, 3))


@pytest.mark.parametrize(
    "name", ["padding", "padding and causal, finite fill", "documents", "prefix", "bias", "reads the score twice"]
)
def test_what_data_decides_is_not_proven(name: str) -> None:
    assert not rows_kept(SPECS[name], 5, 5)


SLOPES = "0.5 * s + {bias} + where({mask}, 0.0, -1e38)"


@pytest.mark.parametrize(
    ("bias", "mask", "rows", "kept"),
    [
        ("t0 * (n - m)", "n <= m", 5, True),
        ("abs(m - n) * t0", "(n <= m + 2) & (n >= m - 3)", 5, True),
        ("t0 * (n - m)", "n <= m", 6, False),  # the last row has no key of its own number
        ("t0 * (n - m)", "n <= m - 1", 5, False),
        ("t0 * (n + m)", "n <= m", 5, False),
        ("t0 + (n - m)", "n <= m", 5, False),
    ],
)
def test_slopes_leave_every_row_the_key_it_meets(bias: str, mask: str, rows: int, kept: bool) -> None:
    score = parse(SLOPES.format(bias=bias, mask=mask))
    spec = AttentionSpec(score, captures=(Captured(("h",), "float32"),))
    assert rows_kept(spec, rows, 5) == kept


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        # the first rows keep nothing but keys as low as the fill
        (f"where(n <= m, s + where(n >= 7, 0.0, {MIN}), {MIN})", False),
        (f"s + where(n >= 7, 0.0, {MIN}) + where(n <= m, 0.0, {MIN})", False),
        ("where(n <= m, s + where(n >= 7, 0.0, -inf), -inf)", False),
        (f"where(n <= m, s + where(n >= 7, -2.0, {MIN}), {MIN})", False),
        ("where(n <= m, s + log(float(n)), -inf)", False),
        # a mask among the summands is an edge of the band like any other
        (f"s + where(n >= m - 3, 0.0, {MIN}) + where(n <= m, 0.0, {MIN})", True),
        (f"s + where(n >= m + 1, 0.0, {MIN}) + where(n <= m, 0.0, {MIN})", False),
        # these are low, but no number that masks
        ("where(n <= m, s + where(n >= 7, 0.0, -1e9), -inf)", True),
        ("where(n <= m, s + -0.5 ** (h + 1) * n / 4.0, -inf)", True),
    ],
)
def test_a_summand_that_is_not_captured_may_mask_too(score: str, kept: bool) -> None:
    assert rows_kept(AttentionSpec(parse(score)), 20, 20) == kept
