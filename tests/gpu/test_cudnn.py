"""cuDNN's backward beside calls of scaled_dot_product_attention of the same sizes, which share its cache of plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnfuse.op import attention
from attnfuse.target import Target
from tests.kernels.cases import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or Target.of(torch.device("cuda")).kind != "cuda", reason="no NVIDIA GPU"
    ),
]


@pytest.mark.parametrize("token_major", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_out_may_lie_otherwise_than_in_an_earlier_call(kv_heads: int, token_major: bool) -> None:
    """The cache of torch 2.11 does not know how out lies: the second call once got the gradients of noise."""
    operands = [
        torch.randn(2, heads, 256, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, kv_heads, kv_heads)
    ]
    if token_major:
        operands = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    leaves = [x.requires_grad_() for x in operands]
    grad = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=kv_heads != 4)
    wanted = torch.autograd.grad(out, leaves, grad)
    ours: Tensor = attention(*leaves, [], [], SPECS["causal"].to_text(), "cudnn", True)[0]
    for found, true in zip(torch.autograd.grad(ours, leaves, grad), wanted, strict=True):
        # the same kernel on the same numbers
        torch.testing.assert_close(found, true, rtol=2**-7, atol=1e-3)
