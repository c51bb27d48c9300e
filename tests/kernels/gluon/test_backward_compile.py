"""What compilers make of the backward body, without a GPU: tensor cores, copies, waits and registers as designed."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from attnfuse.kernels import Residual
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import spec as _spec

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels.gluon.backward_build import BackwardSource, build_backward
from attnfuse.kernels.gluon.backward_plan import backward_sourced
from attnfuse.kernels.triton.gradients import Gradients
from tests.kernels.gluon.test_compile import _assembled, _captures

SPECS = {
    "full": _spec("0.1 * s"),
    "causal": _spec("where(n <= m, 0.1 * s, -inf)"),
    "window": _spec("where((n <= m) & (n >= m - 100), 0.1 * s, -inf)"),
    "softcap": _spec("where(n <= m, 50.0 * tanh(0.1 * s / 50.0), -inf)"),
    "slopes": _spec("where(n <= m, 0.1 * s + t0 * (n - m), -inf)", "float32[h]"),
    "bias": _spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]"),
    "documents": _spec("where(t0 == t1, 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
}
PLAIN = ("full", "causal", "window")


def sourced(spec: AttentionSpec, width: int) -> BackwardSource:
    query = torch.empty(2, 4, 1024, width, dtype=torch.bfloat16, device="meta")
    captures = [x[..., :1024] if x.shape[-1] == 1000 else x for x in _captures(spec)]
    residual = Residual(query, torch.empty(2, 4, 1024, device="meta"))
    needs = [True] * 3 + [False] * len(captures)
    return backward_sourced(Gradients(spec, query, query, query, query, captures, (), needs, residual))[0]


@cache
def compiled(name: str, width: int) -> tuple[BackwardSource, str, str, int]:
    """What was compiled, the PTX, what ptxas says of it, and bytes of shared memory."""
    source = sourced(SPECS[name], width)
    kernel = build_backward(source)
    ptx = str(kernel.asm["ptx"])
    return source, ptx, _assembled(ptx), kernel.metadata.shared
