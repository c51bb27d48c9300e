"""Programs that dequantise around the products are attention of float8 tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.report import Fused
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
