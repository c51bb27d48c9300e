"""Gradients of each kernel against those of the written-out program in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnfuse.op import attention
from attnfuse.reference import attention as reference
from tests.kernels.cases import BATCHES, SIZES, SPECS, Case, assert_as_exact, case
from tests.kernels.test_forward import able

KERNELS = ("blocked", "sdpa")

#: Draws of the operands that errors are pooled over.
SEEDS = 4


def gradients(given: Case, kernel: str | None, grad_out: Tensor) -> list[Tensor]:
    """Of every float operand; ``kernel`` None is the reference."""
    leaves = given.leaves()
    if kernel is None:
        out = reference(leaves.spec, leaves.operands)[0]
    else:
        out = attention(*leaves.tensors[:3], leaves.captures, [], leaves.spec.to_text(), kernel)[0]
    floats = [x for x in leaves.tensors if x.requires_grad]
    found = torch.autograd.grad(out, floats, grad_out.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, floats, strict=True)]


def check(given: Case, kernel: str) -> None:
    if not able(given.leaves(), kernel):
        return
    found, source, truth = (gradients(each, name, grad_out(given)) for each, name in readings(given, kernel))
    if given.query.dtype in (torch.bfloat16, torch.float16):
        # the source rounds its scores, weights and their gradients to the half type: a few units of it
        assert_close_in_half(found, truth)
    else:
        assert_as_exact(found, source, truth, roundings(given, kernel))


def check_all(cases: Sequence[Case], kernel: str) -> None:
    """As :func:`check`, of all cases in one: the error of a few numbers, such as slopes, is chance."""
    able_ones = [given for given in cases if able(given.leaves(), kernel)]
    if not able_ones:
        return
    each = [[gradients(g, name, grad_out(given)) for g, name in readings(given, kernel)] for given in able_ones]
    found, source, truth = (
        [torch.cat([x.flatten() for x in same]) for same in zip(*r, strict=True)] for r in zip(*each, strict=True)
    )
    assert_as_exact(found, source, truth, max(roundings(given, kernel) for given in able_ones))


def readings(given: Case, kernel: str) -> tuple[tuple[Case, str | None], ...]:
    """What is computed three times: by the kernel, by the reference, by the reference in float64."""
    return (given, kernel), (given, None), (given.to(torch.float64), None)


def grad_out(given: Case) -> Tensor:
    shape = (*given.query.shape[:-1], given.value.shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(given.value.dtype)


def roundings(given: Case, kernel: str) -> float:
    """ATen computes weights as exp(s - lse), whose relative error is that of the lse: |lse| roundings."""
    if kernel != "sdpa":
        return 4.0
    lse = reference(given.spec, given.operands)[1]
    return 4.0 + (lse.nan_to_num(neginf=0.0).abs().amax().item() if lse.numel() else 0.0)


def assert_close_in_half(found: list[Tensor], truth: list[Tensor]) -> None:
    for mine, true in zip(found, truth, strict=True):
        assert torch.equal(mine.isnan(), true.isnan())
        unit = torch.finfo(mine.dtype).eps * true.nan_to_num().abs().amax().item()
        assert (mine.double() - true).nan_to_num().abs().mean().item() <= unit
        assert (mine.double() - true).nan_to_num().abs().amax().item() <= 8 * unit


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["plain", "causal", "sink"])
def test_any_strides(name: str, kernel: str) -> None:
    check(case(SPECS[name], SIZES["grouped heads"], torch.float32).transposed(), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_gradients(name: str, kernel: str) -> None:
    for sizes in ("odd", "grouped heads", "more rows than keys", "several blocks"):
        check_all([case(SPECS[name], SIZES[sizes], torch.float32, seed) for seed in range(SEEDS)], kernel)
    check(case(SPECS[name], SIZES["grouped heads"], torch.bfloat16), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_any_number_of_batches(kernel: str) -> None:
    for sizes in BATCHES.values():
        for name in ("scaled", "causal", "alibi"):
            check(case(SPECS[name], sizes, torch.float32), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("empty", ["batch", "rows", "keys"])
def test_gradients_of_sizes_of_zero(empty: str, kernel: str) -> None:
    sizes = replace(SIZES["odd"], **{empty: (0,) if empty == "batch" else 0})
    for name in ("scaled", "sink"):
        check(case(SPECS[name], sizes, torch.float32), kernel)


@pytest.mark.parametrize(
    "name", ["scaled", "causal", "bias", "alibi", "softcap, causal", "sink of each row", "dropout"]
)
def test_gradcheck(name: str) -> None:
    sizes = replace(SIZES["grouped heads"], batch=(1,), rows=3, keys=4, width=2, value_width=3)
    given = case(SPECS[name], sizes, torch.float64).leaves()

    def program(*operands: Tensor) -> Tensor:
        out: Tensor = attention(*operands[:3], operands[3:], [], given.spec.to_text(), "blocked")[0]
        return out

    assert torch.autograd.gradcheck(program, given.tensors)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lse_has_a_gradient(kernel: str) -> None:
    given = case(SPECS["causal"], SIZES["grouped heads"], torch.float32).leaves()
    _, lse = attention(*given.tensors[:3], [], [], given.spec.to_text(), kernel, True)
    _, true = reference(given.spec, given.operands)
    grad = torch.randn_like(lse)
    operands = (given.query, given.key)
    torch.testing.assert_close(torch.autograd.grad(lse, operands, grad), torch.autograd.grad(true, operands, grad))


def test_a_broadcast_batch_of_keys_gets_the_sum() -> None:
    given = case(SPECS["causal"], SIZES["odd"], torch.float32)
    shared = replace(given, key=given.key[:1].clone(), value=given.value[:1].clone())
    grad_out = torch.randn(*given.query.shape)
    torch.testing.assert_close(gradients(shared, "blocked", grad_out), gradients(shared, None, grad_out))


def test_only_what_is_asked_for_is_computed() -> None:
    given = case(SPECS["bias"], SIZES["odd"], torch.float32)
    bias = given.captures[0].requires_grad_()
    out = attention(*given.tensors[:3], [bias], [], given.spec.to_text(), "blocked")[0]
    out.sum().backward()
    assert bias.grad is not None
    assert given.query.grad is None
