"""The backward body made machine code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from attnfuse.kernels.gluon.backward import WARPS, attention_backward
from attnfuse.kernels.gluon.backward_meta import BackwardMeta
from attnfuse.kernels.gluon.build import HOPPER, descriptor, function

__all__ = ["BackwardSource", "build_backward"]

_SIZES = ("heads", "group", "rows", "padded_rows", "keys", "left", "right", "key_tiles", "pairs", "together")


@dataclass(frozen=True)
class BackwardSource:
    """What a compiled backward depends on: as :class:`attnfuse.kernels.gluon.build.Source`, with other programs."""

    meta: BackwardMeta
    dtype: str
    score: str
    pulled: str
    captures: tuple[str, ...] = ()
    strides: tuple[str, ...] = ()
    symbols: int = 0
    reads: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackwardPrograms:
    """A source's programs as jit functions; ``reads`` and ``loaders`` as in the forward's."""

    score: Any
    pulled: Any
    reads: tuple[str, ...]
    loaders: tuple[Any, ...]


@cache
def build_backward(source: BackwardSource) -> Any:
    """The compiled backward. Needs no GPU."""
    meta = source.meta
    strides = attention_backward.arg_names.index("strides")
    ones = [place for place, kind in enumerate(source.strides) if kind == "constexpr"]
    absent = [("panel_desc", meta.panel), ("norm_desc", meta.uncertain), ("strange", meta.uncertain)]
    programs = BackwardPrograms(
        function(source.score), function(source.pulled), source.reads, tuple(map(function, source.loaders))
    )
    constants: dict[str | tuple[int, ...], Any] = {
        "meta": meta,
        "programs": programs,
        **{name: None for name, present in absent if not present},
        **{(strides, place): 1 for place in ones},
    }
    found = GluonASTSource(attention_backward, _signature(source), constants)
    return triton.compile(found, target=HOPPER, options={"num_warps": WARPS.value, "maxnreg": meta.registers_at_entry})


def _signature(source: BackwardSource) -> dict[str, Any]:
    meta = source.meta
    panels = [kind for kind, read in zip(source.captures, source.reads, strict=True) if read == "panel"]
    vector = _numbers([meta.block_m])
    return {
        "q_desc": descriptor(source.dtype, meta.block_m, meta.head_block),
        "k_desc": descriptor(source.dtype, meta.block_n, meta.head_block),
        "v_desc": descriptor(source.dtype, meta.block_n, meta.value_block),
        "grad_desc": descriptor(source.dtype, meta.block_m, meta.value_block),
        "top_desc": vector,
        "norm_desc": vector if meta.uncertain else "constexpr",
        "delta_desc": vector,
        "panel_desc": descriptor(panels[0], meta.block_m, meta.block_n) if panels else "constexpr",
        "dq_desc": _numbers([meta.block_m * meta.head_block // 256, 256]),
        "dk_desc": descriptor(source.dtype, meta.block_n, meta.head_block),
        "dv_desc": descriptor(source.dtype, meta.block_n, meta.value_block),
        "strange": "*i32" if meta.uncertain else "constexpr",
        "captures": tuple(f"*{kind}" for kind in source.captures),
        "strides": source.strides,
        "symbols": ("i32",) * source.symbols,
        **dict.fromkeys(_SIZES, "i32"),
        **dict.fromkeys(("exponent", "factor"), "fp32"),
        **dict.fromkeys(("programs", "meta"), "constexpr"),
    }


def _numbers(block: list[int]) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(block))
    return f"tensordesc<fp32{block},{layout!r}>"
