"""The reference against attention written by hand and against torch's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attnfuse.errors import BadProgram
from attnfuse.operands import Operands
from attnfuse.reference import Scope, attention, evaluate
from attnfuse.score import ARITY, S, apply, parse
from attnfuse.spec import AttentionSpec, Captured

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def operands(*captures: torch.Tensor, dtype: torch.dtype = torch.float64, kv_heads: int = 4) -> Operands:
    query, key, value = (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, 5), (kv_heads, 7), (kv_heads, 7)))
    return Operands(query, key, value, captures)


def scope(rows: int = 5, keys: int = 7, dtype: torch.dtype = torch.float64) -> Scope:
    return Scope(((0, 2), (0, 4), (0, rows), (0, keys)), (), (), dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scaled_attention_is_torchs(kv_heads: int, dtype: torch.dtype) -> None:
    given = operands(dtype=dtype, kv_heads=kv_heads)
    out, lse = attention(AttentionSpec(parse("0.5 * s")), given)
    true = F.scaled_dot_product_attention(*(x.double() for x in given.qkv), scale=0.5, enable_gqa=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, true.to(dtype))
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == torch.float32


def test_a_program_by_hand() -> None:
    slopes = torch.rand(1, 4, 1, 1, dtype=torch.float64)
    given = operands(slopes)
    query, key, value = given.qkv
    spec = AttentionSpec(
        parse("where(n <= m + 2, 3.0 * tanh(s / 3.0) + t0 * (n - m), -inf)"), captures=(Captured(("h",), "float64"),)
    )
    m, n = torch.arange(5)[:, None], torch.arange(7)[None]
    logit = 3 * torch.tanh(query @ key.mT / 3) + slopes * (n - m)
    logit = logit.masked_fill(n > m + 2, float("-inf"))
    out, lse = attention(spec, given)
    torch.testing.assert_close(out, logit.softmax(-1) @ value)
    torch.testing.assert_close(lse, logit.logsumexp(-1).float())


def test_a_number_beyond_the_dtype_is_infinite() -> None:
    """Such as the sum of two fills of the least number, which float64 has and float32 has not."""
    program = parse("where(n < 3, s, -6.8056469327705772e+38)")
    narrow, wide = (evaluate(program, replace(scope(dtype=d), score=torch.zeros((), dtype=d)))
                    for d in (torch.float32, torch.float64))  # fmt: skip
    assert narrow[..., 3:].isneginf().all()
    assert wide[..., 3:].isfinite().all()


def test_a_sink_is_one_more_column() -> None:
    logits = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    given = operands(logits)
    query, key, value = given.qkv
    out, lse = attention(AttentionSpec(sink=parse("t0"), captures=(Captured(("h",), "float64"),)), given)
    weight = (query @ key.mT).exp()
    total = weight.sum(-1, keepdim=True) + logits.exp()
    torch.testing.assert_close(out, weight / total @ value)
    torch.testing.assert_close(lse, total.log().squeeze(-1).float())


def test_a_row_without_keys_is_nan_and_with_a_sink_zero() -> None:
    nothing = AttentionSpec(parse("where(n < 0, s, -inf)"))
    assert attention(nothing, operands())[0].isnan().all()
    assert not attention(replace(nothing, sink=parse("0.5")), operands())[0].any()


def test_dropout_keeps_its_chance_and_its_mean() -> None:
    query, key, value = torch.zeros(1, 8, 64, 4), torch.zeros(1, 8, 256, 4), torch.ones(1, 8, 256, 1)
    out, _ = attention(AttentionSpec(dropout=0.25), Operands(query, key, value, (torch.tensor([3]),)))
    # a mean of 8 * 64 * 256 draws of standard deviation sqrt(0.25 / 0.75): five standard errors
    assert abs(out.mean().item() - 1) < 5 * (0.25 / 0.75 / out.numel() / 256) ** 0.5


def test_dropout_of_everything_is_zero() -> None:
    assert not attention(AttentionSpec(dropout=1.0), operands(torch.tensor([3])))[0].any()


def test_the_sub_block_of_a_program_is_the_block_of_its_value() -> None:
    whole = replace(scope(), captures=[torch.randn(2, 1, 5, 7), torch.randn(1, 4, 1, 1)])
    program = parse("t0 * (m - n) + t1 * h + b0")
    part = replace(whole, spans=((1, 2), (1, 3), (2, 5), (3, 4)))
    torch.testing.assert_close(evaluate(program, part), evaluate(program, whole)[1:2, 1:3, 2:5, 3:4])


@pytest.mark.parametrize(
    ("program", "dtype"),
    [("m + n", torch.int64), ("m < n", torch.bool), ("m * 0.5", torch.float64), ("m / 2", torch.float64),
     ("exp(m)", torch.float64), ("m // 2", torch.int64), ("int(0.7 * m)", torch.int64),
     ("where(m < n, 1.0, 0.0)", torch.float64)],
)  # fmt: skip
def test_the_types_of_arithmetic(program: str, dtype: torch.dtype) -> None:
    assert evaluate(parse(program), scope()).dtype == dtype


def test_integer_division_and_remainder_are_pythons() -> None:
    found = evaluate(parse("(m - 3) // 2 * 10 + (m - 3) % 2"), scope()).flatten().tolist()
    assert found == [(m - 3) // 2 * 10 + (m - 3) % 2 for m in range(5)]


def test_every_operation_has_a_meaning() -> None:
    given = replace(scope(), score=torch.full((2, 4, 5, 7), 0.7, dtype=torch.float64))
    condition = parse("m < n")
    for op, arity in ARITY.items():
        args = [condition if op in ("not", "and", "or", "xor") else S] * arity
        args = [condition, *args[1:]] if op == "where" else args
        assert evaluate(apply(op, *args), given).shape[-1] == 7, op


def test_a_program_of_scores_needs_scores() -> None:
    with pytest.raises(BadProgram, match="score where there is none"):
        evaluate(parse("s"), scope())
