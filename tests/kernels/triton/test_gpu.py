"""On a GPU: each kernel is as exact against float64 as the written-out program there. Run by ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnfuse.kernels import lookup
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.launch import attend
from attnfuse.op import attention
from attnfuse.reference import attention as reference
from attnfuse.target import Target
from attnfuse.weights_op import attention_weights
from tests.kernels.cases import (
    BATCHES,
    SIZES,
    SPECS,
    Case,
    Sizes,
    assert_as_exact,
    case,
    conditioning,
    exact,
    written_out,
)
from tests.kernels.test_backward import gradients
from tests.kernels.test_weights import SOFTMAXES, differentiated, of_type
from tests.kernels.test_weights import exact as exact_weights
from tests.kernels.test_weights import reference as by_autograd
from tests.kernels.test_weights import written_out as weights_written_out

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

KERNELS = ("triton", "cudnn")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = {
    f"heads of {width}, values of {value_width}": Sizes((1,), 4, 2, 261, 333, width, value_width)
    for width, value_width in ((32, 32), (64, 64), (80, 80), (96, 40), (128, 128), (192, 128), (256, 256), (512, 512))
}
DECODE = {
    "one row, grouped": Sizes((2,), 32, 4, 1, 1000, 128, 128),
    "three rows, grouped": Sizes((2,), 12, 4, 3, 517, 64, 64),
}


def on_gpu(given: Case) -> Case:
    moved = [x.to("cuda") for x in given.tensors]
    return Case(given.spec, *moved[:3], tuple(moved[3:]))


def check(given: Case, kernel: str) -> None:
    given = on_gpu(given)
    if lookup(kernel).reasons_against(given.problem(), Target.of(given.query.device)):
        return
    compare(
        given,
        *attention(given.query, given.key, given.value, given.captures, [], given.spec.to_text(), kernel, True),
    )


def compare(given: Case, out: Tensor, lse: Tensor) -> None:
    true, true_lse = reference(given.spec, given.operands)
    source = true if given.spec.dropout else written_out(given)
    assert_as_exact([out], [source], [exact(given)])
    # the lse is float32, of products of the operands' type
    torch.testing.assert_close(lse, true_lse, equal_nan=True, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str, kernel: str) -> None:
    for dtype in DTYPES:
        for sizes in ("odd", "grouped heads", "several blocks", "more rows than keys"):
            check(case(SPECS[name], SIZES[sizes], dtype), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", {**WIDTHS, **DECODE, **BATCHES})
def test_every_size(sizes: str, kernel: str) -> None:
    chosen = {**WIDTHS, **DECODE, **BATCHES}[sizes]
    for dtype in (torch.bfloat16, torch.float32):
        for name in ("scaled", "causal", "window", "alibi", "softcap, causal", "sink", "bias"):
            check(case(SPECS[name], chosen, dtype), kernel)


#: FlashAttention-1: no table of an NVIDIA target has it, so that it runs by these alone.
KEYS_OUTSIDE = {
    "pointers": Schedule("keys outside", rows=64, keys=64, stages=1),
    "loads ahead": Schedule("keys outside", rows=64, keys=64, stages=2, spans=3),
    "descriptors": Schedule("keys outside", rows=64, keys=64, stages=2, spans=3, loading="descriptor"),
    "longest first": Schedule("keys outside", rows=128, keys=64, stages=1, warps=8, spans=2, order="longest first"),
    "persistent": Schedule("keys outside", rows=64, keys=128, stages=1, spans=2, order="persistent"),
}


@pytest.mark.parametrize("schedule", KEYS_OUTSIDE)
@pytest.mark.parametrize("name", ["scaled", "causal", "window", "alibi", "bias", "sink, finite fill", "dropout"])
def test_keys_outside(name: str, schedule: str) -> None:
    for sizes in (*(WIDTHS[f"heads of {each}, values of {each}"] for each in (64, 128)), *DECODE.values()):
        given = on_gpu(case(SPECS[name], sizes, torch.bfloat16))
        out, lse = attend(given.spec, given.operands, with_lse=True, schedule=KEYS_OUTSIDE[schedule])
        compare(given, out, lse)
        # sums that a thread reads before another has written them would not be the same each time
        for _ in range(3):
            assert torch.equal(out, attend(given.spec, given.operands, schedule=KEYS_OUTSIDE[schedule])[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(kernel: str) -> None:
    for dtype in DTYPES:
        for name in ("scaled", "causal", "sink"):
            check(case(SPECS[name], WIDTHS["heads of 64, values of 64"], dtype).transposed(), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_gradients(name: str, kernel: str) -> None:
    for sizes in (SIZES["grouped heads"], SIZES["several blocks"], WIDTHS["heads of 64, values of 64"]):
        for dtype in (torch.bfloat16, torch.float32):
            check_gradients(case(SPECS[name], sizes, dtype), kernel)


@pytest.mark.parametrize("sizes", {**WIDTHS, **BATCHES})
def test_gradients_of_every_size(sizes: str) -> None:
    for name in ("scaled", "causal", "bias", "sink", "dropout"):
        check_gradients(case(SPECS[name], {**WIDTHS, **BATCHES}[sizes], torch.bfloat16), "triton")


def check_gradients(given: Case, kernel: str) -> None:
    given = on_gpu(given)
    if lookup(kernel).reasons_against(given.leaves().problem(), Target.of(given.query.device)):
        return
    out = (*given.query.shape[:-1], given.value.shape[-1])
    grad_out = torch.randn(out, generator=torch.Generator().manual_seed(1)).to("cuda", given.value.dtype)
    truth = gradients(given.to(torch.float64), None, grad_out)
    found = gradients(given, kernel, grad_out)
    if given.query.dtype == torch.float32:
        # weights are exp(s - lse), whose relative error is that of the lse: |lse| roundings
        lse = reference(given.spec, given.operands)[1]
        roundings = 16.0 + lse.nan_to_num(neginf=0.0).clamp(-1e3, 1e3).abs().amax().item()
        assert_as_exact(found, gradients(given, None, grad_out), truth, roundings)
    else:
        assert_as_exact(found, source_gradients(given, grad_out), truth, 8.0)
    if kernel == "triton":
        # no atomics: the same sums in the same order
        again = gradients(given, kernel, grad_out)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))


def source_gradients(given: Case, grad_out: Tensor) -> list[Tensor]:
    """Those of the written-out program in the operands' type; of the reference where it drops weights."""
    if given.spec.dropout:
        return gradients(given, None, grad_out)
    leaves = given.leaves()
    floats = [x for x in leaves.tensors if x.requires_grad]
    found = torch.autograd.grad(written_out(leaves), floats, grad_out, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(floats, found, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lse_has_a_gradient(kernel: str) -> None:
    given = on_gpu(case(SPECS["causal"], WIDTHS["heads of 64, values of 64"], torch.bfloat16)).leaves()
    _, lse = attention(*given.tensors[:3], [], [], given.spec.to_text(), kernel, True)
    exactly = given.to(torch.float64).leaves()
    _, true = reference(exactly.spec, exactly.operands)
    grad = torch.randn_like(lse)
    found = torch.autograd.grad(lse, given.tensors[:2], grad)
    truth = torch.autograd.grad(true, exactly.tensors[:2], grad)
    _, source = reference(given.spec, given.operands)
    assert_as_exact(found, torch.autograd.grad(source, given.tensors[:2], grad), truth, 8.0)


@pytest.mark.parametrize("name", [name for name in SOFTMAXES if SOFTMAXES[name].empty_rows == "nan"])
def test_weights(name: str) -> None:
    for dtype in DTYPES:
        for sizes in (SIZES["grouped heads"], SIZES["several blocks"], WIDTHS["heads of 128, values of 128"]):
            given = on_gpu(case(of_type(SOFTMAXES[name], dtype), sizes, dtype))
            operands = (given.query, given.key, given.captures, [], given.spec.to_text(), "triton")
            found = attention_weights(*operands)
            # sums are taken tile by tile, each rounding once more; a product of float32 is made of three of TF32, which
            # together lose about a rounding of each term, and so of the logit that the terms' magnitudes would make
            terms = replace(given, query=given.query.abs(), key=given.key.abs())
            roundings = 8.0 + (conditioning(terms) if dtype == torch.float32 else 0.0)
            assert_as_exact([found], [weights_written_out(given, dtype)], [exact_weights(given)], roundings)


def test_weights_have_gradients() -> None:
    given = on_gpu(case(of_type(SOFTMAXES["bias"], torch.float32), SIZES["several blocks"], torch.float32))
    grad = torch.randn(*given.query.shape[:-1], given.key.shape[-2], device="cuda")
    found = differentiated(given, grad, lookup("triton").weights_backward)
    truth = differentiated(given.to(torch.float64), grad.double(), by_autograd)
    assert_as_exact(found, differentiated(given, grad, by_autograd), truth, 16.0)


def test_a_broadcast_batch_of_keys() -> None:
    given = on_gpu(case(SPECS["causal"], replace(SIZES["odd"], width=64, value_width=64), torch.bfloat16))
    shared = replace(given, key=given.key[:1], value=given.value[:1])
    spread = replace(given, key=given.key[:1].expand_as(given.key), value=given.value[:1].expand_as(given.value))
    found = [attention(*x.tensors[:3], [], [], x.spec.to_text(), "triton")[0] for x in (shared, spread)]
    assert torch.equal(*found)


def test_more_elements_than_31_bits_count() -> None:
    given = case(SPECS["causal"], Sizes((1,), 1, 1, 40, 40, 64, 64), torch.bfloat16)
    # the second head of a tensor whose heads are 2^31 elements apart
    room = torch.empty(2**31 + 2**16, dtype=torch.bfloat16, device="cuda")
    key = room.as_strided((1, 2, 40, 64), (0, 2**31, 64, 1))
    key.copy_(torch.cat([torch.zeros_like(given.key), given.key], dim=1))
    two = replace(
        given, query=given.query.repeat(1, 2, 1, 1), value=given.value.repeat(1, 2, 1, 1), key=key.cpu().clone()
    )
    operands = (two.query.cuda(), key, two.value.cuda())
    out = attention(*operands, [], [], given.spec.to_text(), "triton")[0]
    assert_as_exact([out.cpu()], [written_out(two)], [exact(two)])
