"""``fp8_attention``: attention of half types is quantised where that is faster, and the report says how exact it is."""

from __future__ import annotations

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
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SIZES, generator=generator).to(dtype) for _ in range(3))


def fused(target: str = "cuda:sm90", given: tuple[Tensor, ...] | None = None, **options: Any) -> Fused:
    given = given or inputs()
    found = rewritten("dynamo", as_module(program), given, kernel="narrow", target=target, **options)
    (site,) = found.report.fused
    if options.get("fp8_attention"):
        ours, exact = found.run(*given), program(*(x.double() for x in given))
        assert (ours.double() - exact).abs().mean() < 0.06 * exact.abs().mean()
    return site


@pytest.mark.parametrize(("target", "dtype"), [("cuda:sm90", "float8_e4m3fn"), ("rocm:gfx942", "float8_e4m3fnuz")])
def test_every_operand_is_quantised(target: str, dtype: str) -> None:
    site = fused(target, fp8_attention=True)
    spec = AttentionSpec.from_text(site.spec)
    assert (spec.weight_dtype, spec.out_dtype, len(spec.captures)) == (dtype, "bfloat16", 3)
    assert "causal" in site.what
    (note,) = site.notes
    assert note.startswith("quantised to float8 as asked for: mean error 0.0")


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
