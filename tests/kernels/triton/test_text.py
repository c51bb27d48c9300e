"""Program texts compute what their programs do: run in torch, on memory as a kernel sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnfuse.form import masked_by
from attnfuse.kernels.triton import function_text, logit_of, untranslatable
from attnfuse.reference import Scope, evaluate
from attnfuse.score import Expr, parse, text
from attnfuse.spec import Captured
from tests.kernels.cases import SIZES, SPECS, Case, case, spec
from tests.kernels.triton.torch_language import TorchLanguage, pointer

FLOAT32 = 16 * torch.finfo(torch.float32).eps


def run(source: str, given: Case, batch: int, head: int, score: Tensor) -> Tensor:
    """The text's value for one batch and head, ``[M, N]``."""
    namespace = {"jit": lambda function: function, "tl": TorchLanguage}
    exec(source, namespace)
    captures = tuple(map(pointer, given.captures))
    strides = tuple(
        tensor.stride(place)
        for tensor, each in zip(given.captures, given.spec.captures, strict=False)
        for place, axis in enumerate(given.spec.axes)
        if axis in each.axes
    )
    rows, keys = score.shape
    m, n = torch.arange(rows, dtype=torch.int32).view(-1, 1), torch.arange(keys, dtype=torch.int32).view(1, -1)
    found = namespace["program"](score, score, (batch,), head, m, n, captures, strides, (7, 3))
    return torch.as_tensor(found).expand(rows, keys)


def check(program: Expr, source: str, given: Case) -> None:
    score = torch.randn(*given.query.shape[:-1], given.key.shape[-2])
    scope = Scope.whole(replace(given.operands, symbols=(7, 3)))
    wanted = evaluate(program, replace(scope, score=score, weight=score)).expand(score.shape)
    for batch, head in ((0, 0), (1, given.query.shape[1] - 1)):
        found = run(source, given, batch, head, score[batch, head])
        torch.testing.assert_close(
            found.to(wanted.dtype), wanted[batch, head], equal_nan=True, rtol=FLOAT32, atol=FLOAT32
        )


@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str) -> None:
    given = case(SPECS[name], SIZES["grouped heads"], torch.float32)
    programs = (given.spec.score, given.spec.weight, *([] if given.spec.sink is None else [given.spec.sink]))
    for program in programs:
        if not untranslatable(program):
            check(program, function_text(program, given.spec.captures), given)


@pytest.mark.parametrize("name", SPECS)
def test_the_parts_of_a_logit_are_the_logit(name: str) -> None:
    given = case(SPECS[name], SIZES["grouped heads"], torch.float32)
    logit = logit_of(given.spec)
    scope = Scope.whole(given.operands)
    score = torch.randn(*given.query.shape[:-1], given.key.shape[-2])
    scope = replace(scope, score=score)
    wanted, found = evaluate(given.spec.score, scope), logit.factor * evaluate(logit.masked, scope)
    mask = masked_by(given.spec)
    masked = torch.zeros(()) > 0 if mask is None else wanted == mask.fill
    masked = masked.expand(wanted.shape)
    assert torch.equal(wanted[masked], found[masked])
    core = logit.factor * evaluate(logit.core, scope)
    for value in (found, core):
        torch.testing.assert_close(value[~masked], wanted[~masked], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize(
    "source",
    [
        "where(s > 0, s // 0.5, s % 0.7)", "float((n - 2 * m) // 3) + float((n - 2 * m) % 5)", "sign(s) * s ** 3",
        "softplus(10.0 * s) + log1p(abs(s)) + expm1(s)", "min(s, 0.3) + max(s, float(n))", "relu(s) + sigmoid(s)",
        "erf(s) + sin(s) - cos(s) + s ** -2", "float(int(3.0 * s)) + z0 * s + abs(s) / z1",
        "exp2(-s) + floor(s) + ceil(s)",
        "where(isnan(log(s)) | ~(n < z0), 1.0, sqrt(abs(s)))", "rsqrt(abs(s)) + reciprocal(s)",
        "tanh(s) + tanh(0.01 * s)",
    ],
)  # fmt: skip
def test_every_operation(source: str) -> None:
    given = case(SPECS["plain"], SIZES["odd"], torch.float32)
    program = parse(source)
    assert not untranslatable(program)
    check(program, function_text(program, ()), given)


def test_tanh_is_exact_to_rounding() -> None:
    source = function_text(parse("tanh(s)"), ())
    score = torch.linspace(-12, 12, 100_001).view(1, -1)
    given = case(SPECS["plain"], SIZES["odd"], torch.float32)
    found = run(source, given, 0, 0, score)
    exact = score.double().tanh()
    assert ((found - exact).abs() / exact.abs().clamp(min=1e-30)).max() < 4 * torch.finfo(torch.float32).eps


def test_powers_that_are_no_products_have_no_text() -> None:
    for source in ("s ** 0.5", "s ** s", "2.0 ** (s * 40.0) + s ** 17"):
        assert untranslatable(parse(source))


def test_equal_parts_are_computed_once() -> None:
    source = function_text(parse("tanh(s + t0) * tanh(s + t0)"), (Captured(("h", "n"), "bfloat16"),))
    assert source.count("tl.load") == source.count("= _tanh(") == 1


def test_offsets_along_the_rows_are_wide() -> None:
    captured = (Captured(("b0", "m", "n"), "float32"),)
    assert "m.to(tl.int64)" in function_text(parse("s + t0"), captured)
    assert "n.to(tl.int64)" not in function_text(parse("s + t0"), captured)
    assert "n.to(tl.int64)" in function_text(parse("s + t0"), captured, wide=True)


def test_a_fill_stays_finite_unless_nobody_sees_it() -> None:
    """-inf makes a fully masked row NaN, a finite fill does not: dividing by a small factor must not make one of it."""
    for fill in (torch.finfo(torch.float32).min, -1e30, -1e9):
        spec = replace(SPECS["plain"], score=parse(f"where(n <= m, 0.001 * s, {fill!r})"))
        seen = logit_of(spec)
        assert (text(seen.masked), seen.factor, seen.huge) == (text(spec.score), 1.0, True)
        unseen = logit_of(spec, rows_kept=True)
        assert unseen.huge == (fill > -1e30)
        assert unseen.huge or (text(unseen.masked), unseen.factor) == ("where(n <= m, s, -inf)", 0.001)


@pytest.mark.parametrize("axes", ["h,m,n", "b0,n", "b0,m", "b0"])
def test_what_is_added_may_be_the_lowest_number(axes: str) -> None:
    """A mask of rows as much as one of keys; but slopes and scales are none."""
    assert logit_of(spec("0.3 * s + t0", f"float32[{axes}]")).huge
    assert not logit_of(spec("0.3 * s + t0", f"float16[{axes}]")).huge
    assert not logit_of(spec("0.3 * (t0 * s)", f"float32[{axes.removesuffix(',n')}]")).huge
    assert not logit_of(spec("0.3 * s + t0 * (n - m)", "float32[h]")).huge
