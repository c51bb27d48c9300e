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

_SIZES = (
    *("heads", "group", "rows", "padded_rows", "keys", "left", "right", "key_tiles", "pairs", "together"),
    *("list_batch", "list_head", "list_length"),
)


@dataclass(frozen=True)
class BackwardSource:
    """What a compiled backward depends on: as :class:`attnfuse.kernels.gluon.build.Source`, with other programs."""

    meta: BackwardMeta
    dtype: str
    bare: str
    pulled: str
    score: str | None = None
    kept: str | None = None
    captures: tuple[str, ...] = ()
    strides: tuple[str, ...] = ()
    symbols: int = 0
    reads: tuple[str, ...] = ()
    bare_reads: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackwardPrograms:
    """A source's programs as jit functions; ``reads``, ``bare_reads`` and ``loaders`` as in the forward's."""

    bare: Any
    pulled: Any
    score: Any
    kept: Any
    reads: tuple[str, ...]
    bare_reads: tuple[str, ...]
    loaders: tuple[Any, ...]


@cache
def build_backward(source: BackwardSource) -> Any:
    """The compiled backward. Needs no GPU."""
    meta = source.meta
    strides = attention_backward.arg_names.index("strides")
    ones = [place for place, kind in enumerate(source.strides) if kind == "constexpr"]
    absent = [
        ("panel_desc", meta.panel), ("dpanel_desc", meta.panel_gradient), ("lists", meta.listed),
        ("norm_desc", meta.uncertain), ("strange", meta.uncertain),
    ]  # fmt: skip
    programs = BackwardPrograms(
        function(source.bare),
        function(source.pulled),
        function(source.score),
        function(source.kept),
        source.reads,
        source.bare_reads,
        tuple(map(function, source.loaders)),
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
    panel = descriptor(panels[0], meta.block_m, meta.block_n) if panels else "constexpr"
    return {
        "q_desc": descriptor(source.dtype, meta.block_m, meta.head_block),
        "k_desc": descriptor(source.dtype, meta.block_n, meta.head_block),
        "v_desc": descriptor(source.dtype, meta.block_n, meta.value_block),
        "grad_desc": descriptor(source.dtype, meta.block_m, meta.value_block),
        "top_desc": vector,
        "norm_desc": vector if meta.uncertain else "constexpr",
        "delta_desc": vector,
        "panel_desc": panel,
        "dq_desc": _numbers([meta.block_m * meta.head_block // 256, 256]),
        "dk_desc": descriptor(source.dtype, meta.block_n, meta.head_block),
        "dv_desc": descriptor(source.dtype, meta.block_n, meta.value_block),
        "dpanel_desc": panel if meta.panel_gradient else "constexpr",
        "strange": "*i32" if meta.uncertain else "constexpr",
        "lists": "*i32" if meta.listed else "constexpr",
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
