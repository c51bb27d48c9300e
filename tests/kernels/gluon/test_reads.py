"""How captures are read, and what a program is in terms of values that were read."""

from __future__ import annotations

import torch

from attnfuse.kernels.gluon.reads import given, reads_of
from attnfuse.score import text
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import spec

BFLOAT16, INT64 = torch.bfloat16, torch.int64
CONTIGUOUS = (4 * 512 * 512, 512 * 512, 512, 1)


def reads(given: AttentionSpec, *strides: tuple[int, ...], dtype: torch.dtype = BFLOAT16) -> tuple[str, ...]:
    return reads_of(given, given.score, strides, [dtype] * len(strides))


def test_rows_and_keys_are_read_once() -> None:
    documents = spec("where(t0 == t1, s + t2, -inf)", "int64[b0,m]", "int64[b0,n]", "float32[h]")
    assert reads(documents, (512, 1, 1, 1), (512, 1, 1, 1), (0, 1, 1, 1), dtype=INT64) == ("row", "key", "row")


def test_a_bias_is_read_in_panels_where_the_copy_engine_can() -> None:
    bias = spec("s + t0", "bfloat16[h,m,n]")
    assert reads(bias, CONTIGUOUS) == ("panel",)
    assert reads(bias, CONTIGUOUS, dtype=INT64) == ("score",)
    assert reads(bias, (4 * 500 * 500, 500 * 500, 500, 1)) == ("score",)
    assert reads(bias, (4 * 512 * 512, 512 * 512, 1, 512)) == ("score",)
    assert reads(bias, (4 * 512 * 512, 512 * 512, 0, 1)) == ("score",)


def test_there_is_one_panel() -> None:
    assert reads(spec("s + t0 + t1", "bfloat16[h,m,n]", "bfloat16[b0,m,n]"), CONTIGUOUS, CONTIGUOUS) == (
        "panel",
        "score",
    )


def test_what_only_the_sink_reads_is_not_read_for_scores() -> None:
    assert reads(spec("s", "bfloat16[h]", sink="t0"), (0, 1, 1, 1)) == ("",)


def test_values_are_symbols_of_their_kind() -> None:
    captured = spec("where(t0, s + t1, float(t2))", "bool[n]", "bfloat16[m]", "int64[n]")
    assert text(given(captured.score, captured.captures, 3)) == "where(z3 != 0, s + float(z4), float(z5))"
