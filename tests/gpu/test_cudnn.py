"""cuDNN's backward beside calls of scaled_dot_product_attention of the same sizes, which share its cache of plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnfuse.kernels import lookup
from attnfuse.op import attention
from attnfuse.target import Target
from tests.kernels.cases import SPECS, Case, Sizes, assert_as_exact, case, written_out
from tests.kernels.test_backward import gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or Target.of(torch.device("cuda")).kind != "cuda", reason="no NVIDIA GPU"
    ),
]


@pytest.mark.parametrize("width", [192, 256])
@pytest.mark.parametrize("name", ["scaled", "causal"])
def test_wide_heads_where_torch_takes_them(name: str, width: int) -> None:
    given = case(SPECS[name], Sizes((2,), 4, 2, 200, 200, width, width), torch.bfloat16)
    leaves = [x.cuda().requires_grad_() for x in given.tensors]
    given = Case(given.spec, *leaves, ())
    if lookup("cudnn").reasons_against(given.problem(), Target.of(torch.device("cuda"))):
        pytest.skip("refused")
    grad = torch.randn_like(given.query)
    found = torch.autograd.grad(attention(*leaves, [], [], given.spec.to_text(), "cudnn", True)[0], leaves, grad)
    source = torch.autograd.grad(written_out(given), leaves, grad)
    assert_as_exact(found, source, gradients(given.to(torch.float64), None, grad), 8.0)


def made(heads: int, *, tokens_first: bool = False) -> Tensor:
    found = torch.randn(2, heads, 256, 64, device="cuda", dtype=torch.bfloat16)
    return found.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else found


@pytest.mark.parametrize("order", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("before", [False, True], ids=["after heads first", "after tokens first"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_out_and_its_gradient_may_lie_otherwise_than_in_an_earlier_call(
    kv_heads: int, before: bool, order: bool
) -> None:
    """The cache of torch 2.11 does not know how they lie: the second call once got the gradients of noise."""
    for tokens_first in (False, True):
        leaves = [made(heads, tokens_first=tokens_first).requires_grad_() for heads in (4, kv_heads, kv_heads)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=kv_heads != 4)
        torch.autograd.grad(out, leaves, made(4, tokens_first=before))
        grad = made(4, tokens_first=order)
        ours: Tensor = attention(*leaves, [], [], SPECS["causal"].to_text(), "cudnn", True)[0]
        again: Tensor = attention(*leaves, [], [], SPECS["causal"].to_text(), "triton", True)[0]
        pairs = zip(*(torch.autograd.grad(each, leaves, grad) for each in (ours, again)), strict=True)
        for found, wanted in pairs:
            # two kernels, both exact to about 2^-8 of the norm
            assert (found - wanted).norm() < 2**-6 * wanted.norm()
