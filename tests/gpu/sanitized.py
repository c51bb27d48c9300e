"""A few small launches of every body, for compute-sanitizer to watch; it says itself what it found.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitized
"""

from __future__ import annotations

import sys

import torch

from attnfuse.kernels import lookup
from attnfuse.op import attention
from attnfuse.target import Target
from tests.kernels.cases import SPECS, Case, Sizes, case

KERNELS = ("triton", "gluon")
#: Ragged on both sides, with key heads that are shared.
SIZES = (Sizes((1,), 2, 1, 150, 171, 64, 64), Sizes((2,), 2, 2, 1, 300, 128, 128))
NAMES = ("scaled", "causal", "window", "bias", "alibi", "softcap, causal", "sink, finite fill", "dropout")


def run(given: Case, kernel: str) -> bool:
    """Forward and backward of a case; whether the kernel takes it."""
    operands = [x.cuda().requires_grad_(x.is_floating_point()) for x in given.operands]
    if lookup(kernel).reasons_against(given.leaves().problem(), Target.of(torch.device("cuda"))):
        return False
    out, lse = attention(*operands[:3], operands[3:], [], given.spec.to_text(), kernel, True)
    leaves = [x for x in operands if x.requires_grad]
    torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.zeros_like(lse)], allow_unused=True)
    torch.cuda.synchronize()
    return True


def main() -> None:
    """Runs all there are."""
    done = [
        f"{kernel}: {name}"
        for kernel in KERNELS
        for name in NAMES
        for sizes in SIZES
        if run(case(SPECS[name], sizes, torch.bfloat16), kernel)
    ]
    sys.stdout.write(f"{len(done)} forwards and backwards\n")


if __name__ == "__main__":
    main()
