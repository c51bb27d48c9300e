"""``fp8_attention``: attention of half types is quantised where that is faster, and the report says how exact it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attnfuse import rewrite
from attnfuse.kernels import Problem, registry
from attnfuse.kernels.cpu.blocked import Blocked
from attnfuse.reference import is_float8
from attnfuse.report import Fused
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.float8.programs import quantised
from tests.support.doors import as_module, rewritten

SIZES = (2, 4, 48, 16)


class Narrow(Blocked):
    """Twice as fast with float8."""

    name: ClassVar[str] = "narrow"
    devices: ClassVar[tuple[str, ...]] = ("cuda", "rocm")

    def cost(self, problem: Problem, target: Target) -> float:
        return 0.5 if is_float8(problem.value.dtype) else 1.0


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KERNELS, "narrow", Narrow())


def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * 0.25
    keep = torch.ones(SIZES[2], SIZES[2], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), dim=-1) @ v


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return normal(SIZES, SIZES, SIZES, dtype=dtype)


def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pairs of query heads share a key head."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return torch.softmax((q @ k.mT) * 0.25, dim=-1) @ v


def straight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT) * 0.25, dim=-1) @ v


#: Programs, and the shapes of query, key and value, whose leading dimensions need not be the same.
SHAPES = {
    "heads in pairs": (shared, (2, 4, 48, 16), (2, 2, 40, 16), (2, 2, 40, 16)),
    "one key head": (straight, (2, 4, 48, 16), (2, 1, 40, 16), (2, 1, 40, 16)),
    "one batch of keys": (straight, (2, 4, 48, 16), (1, 4, 40, 16), (1, 4, 40, 16)),
    "two batch dimensions": (straight, (3, 2, 2, 48, 16), (3, 1, 2, 40, 16), (1, 2, 2, 40, 16)),
    "no heads": (straight, (2, 48, 16), (2, 40, 16), (2, 40, 16)),
}


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def run_quantised(door: str, run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Tensor:
    """What the quantised program makes of ``given``."""
    found = rewritten(door, as_module(run), given, kernel="narrow", target="cuda:sm90", fp8_attention=True)
    (site,) = found.report.fused
    assert "float8 weights" in site.what
    return found.run(*given)


def error(found: Tensor, exact: Tensor) -> float:
    """Mean error over the mean of what is exact."""
    return ((found.double() - exact).abs().mean() / exact.abs().mean()).item()


def fused(target: str = "cuda:sm90", given: tuple[Tensor, ...] | None = None, **options: Any) -> Fused:
    given = given or inputs()
    found = rewritten("dynamo", as_module(program), given, kernel="narrow", target=target, **options)
    (site,) = found.report.fused
    if options.get("fp8_attention"):
        assert error(found.run(*given), program(*(x.double() for x in given))) < 0.06
    return site


@pytest.mark.parametrize(("target", "dtype"), [("cuda:sm90", "float8_e4m3fn"), ("rocm:gfx942", "float8_e4m3fnuz")])
def test_every_operand_is_quantised(target: str, dtype: str) -> None:
    site = fused(target, fp8_attention=True)
    spec = AttentionSpec.from_text(site.spec)
    assert (spec.weight_dtype, spec.out_dtype, len(spec.captures)) == (dtype, "bfloat16", 3)
    assert [captured.axes for captured in spec.captures] == [("b0", "h")] * 3
    assert "causal" in site.what
    (note,) = site.notes
    assert note.startswith("quantised to float8 as asked for: mean error 0.0")


@pytest.mark.parametrize("door", ["dynamo", "training IR", "core ATen"])
@pytest.mark.parametrize("name", SHAPES)
def test_heads_and_batches_that_are_shared(name: str, door: str) -> None:
    run, *shapes = SHAPES[name]
    given = normal(*shapes)
    assert error(run_quantised(door, run, given), run(*(x.double() for x in given))) < 0.06


@pytest.mark.parametrize("at", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("times", [64.0, 2.0**14])
def test_a_loud_head_does_not_change_the_others(times: float, at: int) -> None:
    """Not by a bit; one scale for the whole tensor leaves them fewer of float8's bits the louder it is."""
    given = normal(SIZES, SIZES, SIZES)
    before = run_quantised("dynamo", straight, given)
    given[at][:, 1] *= times
    after, others = run_quantised("dynamo", straight, given), [0, 2, 3]
    assert torch.equal(after[:, others], before[:, others])
    exact = straight(*(x.double() for x in given))
    of_tensor = straight(*(rounded_by(x, (0, 1, 2, 3)) for x in given))
    of_heads = error(after[:, others], exact[:, others])
    assert of_heads < 0.06
    # e4m3 holds 15 powers of two with all their bits: 64 is six of them, which a scale for all can still bear
    assert (error(of_tensor[:, others], exact[:, others]) > 1.5 * of_heads) == (times > 64)


def rounded_by(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x`` in float8, with one scale along ``dims``, as float64."""
    narrow, scale = quantised(x.float(), dims)
    return narrow.double() * scale.double()


def test_nothing_is_quantised_unless_asked_for() -> None:
    assert AttentionSpec.from_text(fused().spec).captures == ()


def test_nothing_is_quantised_where_it_cannot_be() -> None:
    """No units for it; a program that is more exact than half types; a gradient."""
    learned = tuple(x.requires_grad_() for x in inputs())
    for site in (
        fused("cuda:sm80", fp8_attention=True),
        fused(given=inputs(torch.float32), fp8_attention=True),
        fused(given=learned, fp8_attention=True),
    ):
        assert AttentionSpec.from_text(site.spec).captures == ()


def test_an_operand_of_zeros_stays_one() -> None:
    q, k, v = inputs()
    found = rewritten("dynamo", as_module(program), (q, k, v), kernel="narrow", target="cuda:sm90", fp8_attention=True)
    assert found.run(q, k, torch.zeros_like(v)).abs().max() == 0
    assert found.run(torch.zeros_like(q), k, v).isfinite().all()


def test_an_exported_program_holds_the_quantised_node() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return program(q, k, v)

    exported = torch.export.export(Model(), inputs())
    result, report = rewrite(
        exported, custom_op=True, kernel="narrow", target="cuda:sm90", fp8_attention=True, profit=False
    )
    assert "float8 weights" in report.fused[0].what
    ours, theirs = result.module()(*inputs()), program(*inputs())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.2)
