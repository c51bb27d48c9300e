"""A few small launches of every Triton body, for compute-sanitizer to watch; it says itself what it found.

Compile first, in parallel: under the sanitizer a compilation takes as long as all the rest::

    for what in $(python -m tests.gpu.sanitized --list); do python -m tests.gpu.sanitized $what & done; wait
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitized
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from attnfuse.kernels.triton.launch import attend
from attnfuse.op import attention
from tests.kernels.cases import SPECS, Sizes, case
from tests.kernels.triton.interpreted_tiles import setting
from tests.kernels.triton.test_gpu_float8 import of, on_gpu

#: Ragged on both sides, with key heads that are shared; keys that are split.
RAGGED, ONE_ROW = Sizes((1,), 2, 1, 150, 171, 64, 64), Sizes((2,), 2, 1, 1, 700, 128, 128)


def both_ways(name: str) -> None:
    """Forward and backward of a spec."""
    given = case(SPECS[name], RAGGED, torch.bfloat16)
    operands = [x.cuda().requires_grad_(x.is_floating_point()) for x in given.tensors]
    out, lse = attention(*operands[:3], operands[3:], [], given.spec.to_text(), "triton", True)
    leaves = [x for x in operands if x.requires_grad]
    ones = [torch.ones_like(out), torch.zeros_like(lse)]
    torch.autograd.grad([out, lse], leaves, ones, allow_unused=True)


def decoding() -> None:
    """One row, its keys split and merged."""
    given = case(SPECS["scaled"], ONE_ROW, torch.bfloat16)
    attention(*(x.cuda() for x in given.tensors[:3]), [], [], given.spec.to_text(), "triton")


def float8() -> None:
    """A forward of float8, value as it is and transposed."""
    dtype = torch.float8_e4m3fn
    given = case(of("scale of each head", "float8_e4m3fn", rounded=True), RAGGED, torch.float32)
    given = replace(given, key=given.key[:, :, :160], value=given.value[:, :, :160])
    for minor in ("d", "n"):
        moved = on_gpu(given, dtype, dtype, minor)
        attend(moved.spec, moved.operands)


def lists() -> None:
    """Lists of tiles, by ranges and score by score."""
    for name in ("documents", "blocks of each head"):
        given = setting(name, "open", 50, 150)
        given.listing.launcher(torch.device("cuda"))([x.cuda() for x in given.captures])


LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        name.replace(",", "").replace(" ", "-"): partial(both_ways, name)
        for name in ("causal", "alibi", "bias", "sink, finite fill", "dropout", "softcap, causal")
    },
    "decoding": decoding,
    "float8": float8,
    "lists": lists,
}


def main() -> None:
    """Runs those that are named, or all."""
    if "--list" in sys.argv:
        sys.stdout.write(" ".join(LAUNCHES) + "\n")
        return
    for name in sys.argv[1:] or LAUNCHES:
        LAUNCHES[name]()
        torch.cuda.synchronize()
        sys.stdout.write(f"{name}: launched\n")


if __name__ == "__main__":
    main()
