"""Programs that dequantise around the products are attention of float8 tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.report import Fused
from attnfuse.score import P, text
from attnfuse.spec import AttentionSpec
from tests.float8.programs import CASES, SCALED, Case, each_operand, quantised
from tests.place.conftest import Picky, picky
from tests.support.doors import as_module, rewritten
from tests.support.specs import assert_same_spec

__all__ = ["picky"]


BY_NAME = {case.name: pytest.param(case, id=case.name) for case in CASES}
THROUGH_EVERY_DOOR = ("each_operand, token, e4m3fn", "quantised_weights, head, e4m3fn")


def fused(door: str, program: Callable[..., Any], inputs: tuple[Tensor, ...], kernel: str) -> Fused:
    """The one site, which the certificate let through."""
    (site,) = rewritten(door, as_module(program), inputs, kernel=kernel, target="cuda:sm90").report.fused
    assert site.certificate.skipped == ""
    return site


@pytest.mark.parametrize("case", BY_NAME.values())
def test_the_spec(case: Case, picky: Picky) -> None:
    site = fused("training IR", case.program, case.inputs(), picky({}))
    assert_same_spec(AttentionSpec.from_text(site.spec), case.spec)


@pytest.mark.parametrize("door", ["dynamo", "core ATen"])
@pytest.mark.parametrize("case", [BY_NAME[name] for name in THROUGH_EVERY_DOOR])
def test_the_spec_through_other_doors(case: Case, door: str, picky: Picky) -> None:
    site = fused(door, case.program, case.inputs(), picky({}))
    assert_same_spec(AttentionSpec.from_text(site.spec), case.spec)


@pytest.mark.parametrize("case", BY_NAME.values())
def test_the_result(case: Case) -> None:
    """Whatever kernel is chosen on the CPU, of float8 tensors or of what the graph makes of them."""
    found = rewritten("training IR", as_module(case.program), case.inputs())
    assert len(found.report.fused) == 1
    ours, theirs = found.run(*case.inputs()), case.program(*case.inputs())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_a_scale_that_varies_along_what_is_summed_stays_outside(picky: Picky) -> None:
    """Of query and key along the columns; value's columns are not summed, but no weight varies along them."""
    pairs = [quantised(torch.randn(2, 4, 48, 16), SCALED["channel"]) for _ in range(3)]
    site = fused("training IR", each_operand, (*(x for x, _ in pairs), *(scale for _, scale in pairs)), picky({}))
    assert AttentionSpec.from_text(site.spec).captures == ()


def behind(q8: Tensor, k8: Tensor, v: Tensor, by: Tensor) -> Tensor:
    """What values were divided by multiplies their product."""
    weights = torch.softmax(q8.to(torch.bfloat16) @ k8.to(torch.bfloat16).mT * 0.25, dim=-1)
    return weights @ v.to(torch.bfloat16) * by


def divided(q8: Tensor, k8: Tensor, v: Tensor, by: Tensor) -> Tensor:
    """The same as a quotient."""
    weights = torch.softmax(q8.to(torch.bfloat16) @ k8.to(torch.bfloat16).mT * 0.25, dim=-1)
    return weights @ v.to(torch.bfloat16) / by


def seen(q8: Tensor, k8: Tensor, v: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """The product is a result too."""
    weights = torch.softmax(q8.to(torch.bfloat16) @ k8.to(torch.bfloat16).mT * 0.25, dim=-1)
    out = weights @ v.to(torch.bfloat16)
    return out, out * by


def of_behind(by: Tensor, value: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 48, 16, generator=generator) for _ in range(3))
    return q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), v.to(value), by


def scale_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)


@pytest.mark.parametrize("program", [behind, divided])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 1, 1), (2, 4, 48, 1), ()], ids=str)
def test_what_multiplies_the_result_is_a_factor_of_the_weights(
    shape: tuple[int, ...], program: Callable[..., Tensor], picky: Picky
) -> None:
    """Nothing is left to be done with the result."""
    given = of_behind(scale_of(*shape))
    found = rewritten("dynamo", as_module(program), given, kernel=picky({}), target="cuda:sm90")
    (site,) = found.report.fused
    assert text(AttentionSpec.from_text(site.spec).weight) == ("t0 * p" if program is behind else "p / t0")
    theirs = program(*given)
    torch.testing.assert_close(found.run(*given), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


OUTSIDE = {
    "varies along the columns": (behind, of_behind(scale_of(2, 4, 1, 16))),
    "makes the result wider": (behind, of_behind(scale_of(1, 4, 1, 1, dtype=torch.float32))),
    "has a gradient": (behind, of_behind(scale_of(1, 4, 1, 1).requires_grad_())),
    "values are no float8": (behind, of_behind(scale_of(1, 4, 1, 1), torch.bfloat16)),
    "the product is seen": (seen, of_behind(scale_of(1, 4, 1, 1))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_multiplies_the_result_stays_outside_where_it(name: str, picky: Picky) -> None:
    program, given = OUTSIDE[name]
    report = rewritten("dynamo", as_module(program), given, kernel=picky({}), target="cuda:sm90").report
    (site,) = report.fused
    assert not report.refused
    assert AttentionSpec.from_text(site.spec).weight == P


def test_a_cast_that_rounds_is_no_dequantisation(picky: Picky) -> None:
    """What is cast to float8 and back was rounded there: the float8 tensor is the operand, not what it was made of."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.to(torch.float8_e4m3fn).to(q.dtype)
        return torch.softmax(q @ k.mT, dim=-1) @ v

    inputs = tuple(torch.randn(2, 4, 48, 16).to(torch.bfloat16) for _ in range(3))
    module = as_module(program)
    found = rewritten("training IR", module, inputs, kernel=picky({}), target="cuda:sm90")
    (node,) = (node for node in found.run.graph.nodes if "attention" in str(node.target))
    assert [node.args[place].meta["val"].dtype for place in range(3)] == [
        torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16,
    ]  # fmt: skip


def test_what_needs_a_gradient_is_not_seen_through(picky: Picky) -> None:
    """A float8 has no gradient worth having."""
    q8, k8, v8, *scales = CASES[0].inputs()
    inputs = (q8, k8, v8, *(scale.requires_grad_() for scale in scales))
    found = rewritten("dynamo", as_module(each_operand), inputs, kernel=picky({}), target="cuda:sm90")
    (site,) = found.report.fused
    assert AttentionSpec.from_text(site.spec).captures == ()


def test_a_kernel_that_is_faster_with_what_the_graph_makes_of_them_gets_that() -> None:
    """ATen's flash attention on a CPU reads no float8."""
    case = CASES[0]
    report = rewritten("training IR", as_module(case.program), case.inputs(), kernel="sdpa").report
    (site,) = report.fused
    assert site.kernel == "sdpa"
