"""torch's flex_attention, in graphs that Inductor compiles: its C++ loop has the score program inside.

Unlike the other kernels it is no call of our op but a higher-order operator in the graph, with the program and the
mask as graphs of their own. Run eagerly, that operator is dense and slow, but right.

A row whose logits are all -inf is zero in flex_attention, so it is taken where the spec says so too, or where there
is no such row. A captured tensor that this proof needs to be finite is read as NaN where it is not: the row is NaN
then, as in the source. (Behind a finite fill the source weighs the masked keys of such a row instead.)
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention  # torch.ops.higher_order has it once this ran

from attnfuse.kernels.cpu import cost
from attnfuse.kernels.cpu.batches import four_d
from attnfuse.kernels.cpu.blockmask import block_mask
from attnfuse.kernels.cpu.element import Modification
from attnfuse.kernels.cpu.split import never_empty, split
from attnfuse.kernels.cpu.stored import stored
from attnfuse.kernels.kernel import Kernel
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel
from attnfuse.operands import Operands
from attnfuse.score import P
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Flex"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: What the public flex_attention adds to its options where nothing is asked for.
_OPTIONS: dict[str, Any] = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


@kernel
class Flex(Kernel):
    """flex_attention, the score program in its loop: inference, sizes that are known, compiled by Inductor."""

    name: ClassVar[str] = "flex"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    zeroes_empty_rows: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What flex_attention cannot say, answers differently, or cannot do on this machine."""
        reasons = (*_cannot_say(problem.spec), *_cannot_take(problem), *_means_otherwise(problem))
        return reasons or _switched_off() or _cannot_compile()

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.cpu.cost`."""
        return cost.flex(problem)

    def inlines(self, problem: Problem) -> bool:
        """Always: run eagerly, the operator is dense."""
        return True

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        batch, rows, keys = tuple(operands.query.shape[:-3]), operands.query.shape[-2], operands.key.shape[-2]
        parts = split(spec, rows, keys)
        poisoned = parts.trusted if spec.empty_rows == "nan" else frozenset()
        score, mask = (Modification(spec, program, batch, operands.captures) for program in (parts.score, parts.keep))
        query, key, value = (four_d(operand, batch) for operand in operands.qkv)
        out, *_ = flex_attention(
            query,
            key,
            value,
            score.score_mod,
            block_mask(parts.band, query, keys, mask.mask_mod).as_tuple(),
            parts.scale,
            dict(_OPTIONS),
            tuple(stored(buffer, slot in poisoned) for slot, buffer in score.buffers.items()),
            tuple(stored(buffer) for buffer in mask.buffers.values()),
        )
        out = stored(out.transpose(1, 2)).transpose(1, 2)
        result: Tensor = out.view(*batch, *out.shape[-3:]) if len(batch) != 1 else out
        return result


# --- what it refuses --------------------------------------------------------------------------------


def _cannot_say(spec: AttentionSpec) -> tuple[str, ...]:
    reasons = [
        (spec.sink is not None, "flex_attention has no sinks, and gives no LSE on CPUs to add them by"),
        (spec.weight != P, "flex_attention has no weight program"),
        (spec.dropout > 0, "flex_attention has no dropout"),
        (spec.symbols > 0, "a size in the program is only known when it runs"),
        (any({"m", "n"} <= set(c.axes) for c in spec.captures), "a tensor that is read score by score would be copied"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


def _cannot_take(problem: Problem) -> tuple[str, ...]:
    dtypes = set(problem.dtypes)
    sizes = (*problem.query.shape, *problem.key.shape, *problem.value.shape)
    reasons = [
        (not problem.compiled, "is dense where nothing compiles it"),
        (problem.dynamic, "is compiled for sizes that are known, and here one is symbolic"),
        (problem.training, "has no backward on CPUs"),
        (problem.autocast, "fails in Inductor under autocast"),
        (len(dtypes) > 1 or not dtypes <= set(DTYPES), "needs operands of one dtype: float32, bfloat16 or float16"),
        (problem.rows == 1, "one query row is a matrix times a vector, which blocks of rows do not help"),
        (0 in sizes, "needs every size to be at least one"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


def _means_otherwise(problem: Problem) -> tuple[str, ...]:
    spec = problem.spec
    if problem.numerics == "fast" or spec.empty_rows == "zero" or problem.rows_kept:
        return ()
    if never_empty(spec, problem.rows, problem.keys):
        return ()
    return ("makes a row zero whose logits are all -inf, which here is NaN and cannot be ruled out",)


def _switched_off() -> tuple[str, ...]:
    return ("torch.compile is switched off",) if torch._dynamo.config.disable else ()


@lru_cache(maxsize=1)
def _cannot_compile() -> tuple[str, ...]:
    """Why Inductor cannot compile flex_attention on this machine."""
    if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        return ("before torch 2.13 it cannot read query, key and value of one projection",)
    if sys.platform == "darwin" or not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512", "AMX")):
        return ("Inductor compiles it for x86 CPUs with AVX2 or more, not for this one",)
    # half of Inductor, imported where it will be needed
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return ("Inductor needs a C++ compiler, and there is none; CXX names one",)
    return ()
