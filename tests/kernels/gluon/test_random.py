"""A thousand random shapes and programs on a Hopper GPU, fifty programs of twenty shapes, as exact as written out.

``pytest -m gpu tests/kernels/gluon/test_random.py -n 12``; each test's name is the seed of its program.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from attnfuse.kernels import lookup
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import Case, Sizes, assert_as_exact, spec, written_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]

PROGRAMS, SHAPES = 50, 20
MIN = torch.finfo(torch.float32).min
#: A mask, and what it captures.
MASKS = {
    "n <= m + {offset}": (),
    "n <= m + {left}": ("int64[b0]",),
    "(n <= m + {offset}) & (n >= m + {offset} - {window})": (),
    "(n <= m + {offset} + 40) & (n >= m + {offset} - {window})": (),
    "(n <= m + {offset}) | (n < {window})": (),
    "m // {window} == n // {window}": (),
    "{padding}": ("bool[b0,n]",),
    "(n <= m + {offset}) & {padding}": ("bool[b0,n]",),
    "{left} == {right}": ("int32[b0,m]", "int32[b0,n]"),
    "(n <= m + {offset}) & ({left} == {right})": ("int64[b0,m]", "int64[b0,n]"),
    "{padding} ": ("bool[b0,m,n]",),
    "(n >= m + {offset} - {window}) & {padding}": ("bool[h,m,n]",),
}
#: A summand, and what it captures.
BIASES = {"": (), "{bias}": ("bfloat16[h,m,n]",), "{bias} * (n - m)": ("float32[h]",), "{bias} ": ("float32[b0,n]",)}
WIDTHS = ((64, 64), (64, 64), (128, 128), (128, 128), (128, 128), (256, 256), (192, 128), (80, 96))


def program_of(chosen: random.Random) -> AttentionSpec:
    """A scale, a softcap or none, a summand or none, a mask or none, a sink or none."""
    captures: list[str] = []

    def captured(kinds: tuple[str, ...]) -> list[str]:
        captures.extend(kinds)
        return [f"t{len(captures) - len(kinds) + place}" for place in range(len(kinds))]

    score = f"{chosen.choice((0.1, 0.125, -0.2))} * s"
    if chosen.random() < 0.25:
        score = f"20.0 * tanh({score} / 20.0)"
    bias, kinds = chosen.choice([("", ()), *BIASES.items()])
    if bias:
        score = f"{score} + {bias.format(bias=captured(kinds)[0])}"
    if chosen.random() < 0.85:
        mask, kinds = chosen.choice(list(MASKS.items()))
        first, last = (*captured(kinds), "", "")[: max(len(kinds), 1) + 1][:: max(len(kinds) - 1, 1)][:2]
        offset, window = chosen.choice((0, 0, 100, -70)), chosen.choice((1, 64, 200, 300))
        mask = mask.format(offset=offset, window=window, padding=first, left=first, right=last)
        score = f"where({mask}, {score}, {chosen.choice(('-inf', '-inf', MIN))})"
    sink = captured(("float32[h]",))[0] if chosen.random() < 0.2 else None
    return spec(score, *captures, sink=sink)


def sizes_of(chosen: random.Random, widths: tuple[int, int]) -> Sizes:
    """Up to 1700 rows and keys, tiles whole or not."""
    kv_heads, group = chosen.choice((1, 2)), chosen.choice((1, 1, 2, 3))
    rows = chosen.choice((chosen.randint(1, 1700), 128 * chosen.randint(1, 12), 192 * chosen.randint(1, 8)))
    keys = chosen.choice((rows, chosen.randint(1, 1700), 128 * chosen.randint(1, 12), 8 * chosen.randint(128, 200)))
    return Sizes((chosen.choice((1, 2, 3)),), kv_heads * group, kv_heads, rows, keys, *widths)


def drawn(given: AttentionSpec, sizes: Sizes, dtype: torch.dtype, seed: int, device: str = "cuda") -> Case:
    """Random operands on the device; masks of blocks, documents of many lengths."""
    torch.manual_seed(seed)

    def operand(heads: int, length: int, width: int) -> Tensor:
        shape = (*sizes.batch, length, heads, width) if seed % 2 else (*sizes.batch, heads, length, width)
        made = torch.randn(shape, device=device, dtype=dtype)
        return made.transpose(1, 2) if seed % 2 else made

    extent = dict(zip(given.axes, (*sizes.batch, sizes.heads, sizes.rows, sizes.keys), strict=True))
    captures = []
    for each in given.captures:
        shape = [extent[axis] if axis in each.axes else 1 for axis in given.axes]
        captures.append(captured(shape, each.dtype, device))
    key, value = (
        operand(sizes.kv_heads, sizes.keys, sizes.width),
        operand(sizes.kv_heads, sizes.keys, sizes.value_width),
    )
    return Case(given, operand(sizes.heads, sizes.rows, sizes.width), key, value, tuple(captures))


def captured(shape: list[int], dtype: str, device: str) -> Tensor:
    """Documents count up along their axis; a mask keeps two blocks of 100 in three, and most scores elsewhere not."""
    if dtype.startswith("int"):
        starts = torch.rand(shape, device=device) < 0.005
        return starts.flatten(1).cumsum(1).view(shape).to(getattr(torch, dtype))
    if dtype == "bool":
        coarse = torch.rand([-(-size // 100) if size > 3 else size for size in shape], device=device) < 0.66
        for axis, size in enumerate(shape):
            if size > 3:
                coarse = coarse.repeat_interleave(100, axis).narrow(axis, 0, size)
        return coarse | (torch.rand(shape, device=device) < 0.0005)
    return torch.randn(shape, device=device).to(getattr(torch, dtype))


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_as_exact_as_the_written_out_program(seed: int) -> None:
    chosen = random.Random(seed)
    given, widths = program_of(chosen), chosen.choice(WIDTHS)
    dtype = chosen.choice((torch.bfloat16, torch.float16))
    for shape in range(SHAPES):
        sizes = sizes_of(chosen, widths)
        one = drawn(given, sizes, dtype, 1000 * seed + shape)
        out, lse = lookup("gluon").run_with_lse(given, one.operands)
        true = one.to(torch.float64)
        wanted, wanted_lse = reference(given, true.operands)
        assert_as_exact([out], [written_out(one)], [wanted])
        # logits are sums of products of halves, exact in float32 to 2^-24 of their size
        torch.testing.assert_close(lse.double(), wanted_lse.double(), atol=4e-3, rtol=1e-4, equal_nan=True)
