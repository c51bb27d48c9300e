"""A body made machine code: its signature, its options, and the cache of what is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from attnfuse.kernels.gluon.forward import ROWS, attention_forward
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.triton.program import compiled

__all__ = ["HOPPER", "Source", "build", "descriptor", "function"]

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    "bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32, "fp8e4nv": gl.float8e4nv, "fp8e5": gl.float8e5,
}  # fmt: skip
_SIZES = (
    *("heads", "group", "kv_batch", "rows", "keys", "left", "right", "row_tiles", "pairs", "together"),
    *("list_batch", "list_head", "list_length"),
)


@dataclass(frozen=True)
class Source:
    """What a compiled forward depends on: its choices, its types, and the texts of its programs.

    ``dtype`` is Triton's name of the operands' type, ``value`` and ``out`` those of value's and of the output's where
    they are others; ``captures`` and ``strides`` those of the captures' elements and of their strides, a stride of 1
    being ``"constexpr"``; ``symbols`` how many sizes programs read.
    """

    meta: Meta
    dtype: str
    score: str | None = None
    bare: str | None = None
    sink: str | None = None
    captures: tuple[str, ...] = ()
    strides: tuple[str, ...] = ()
    symbols: int = 0
    reads: tuple[str, ...] = ()
    bare_reads: tuple[str, ...] = ()
    loaders: tuple[str, ...] = ()
    factor: str | None = None
    value: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class Programs:
    """A source's programs as jit functions: ``bare`` is the score's in tiles that the mask does not cut, ``factor``
    what rows of the output are multiplied by.

    ``reads`` says of each capture how ``loaders`` read it for ``score``, ``bare_reads`` for ``bare``.
    ``"row"``: once for the rows of a work item. ``"key"``: once for a tile's keys. ``"score"``: for each score.
    ``"panel"``: by the copy engine.
    """

    score: Any
    bare: Any
    sink: Any
    factor: Any
    reads: tuple[str, ...]
    bare_reads: tuple[str, ...]
    loaders: tuple[Any, ...]


@cache
def build(source: Source) -> Any:
    """The compiled forward. Needs no GPU."""
    ones = [place for place, kind in enumerate(source.strides) if kind == "constexpr"]
    strides = attention_forward.arg_names.index("strides")
    constants: dict[str | tuple[int, ...], Any] = {
        "meta": source.meta,
        **({} if source.meta.panel else {"panel_desc": None}),
        **({} if source.meta.listed else {"lists": None}),
        "programs": Programs(
            function(source.score),
            function(source.bare),
            function(source.sink),
            function(source.factor),
            source.reads,
            source.bare_reads,
            tuple(map(function, source.loaders)),
        ),
        **{(strides, place): 1 for place in ones},
    }
    found = GluonASTSource(attention_forward, _signature(source), constants)
    return triton.compile(found, target=HOPPER, options={"num_warps": 4, "maxnreg": source.meta.registers_at_entry})


@cache
def function(text: str | None) -> Any:
    """A program's text as a function that bodies call, made once; None has no function to call."""

    def named(*, name: str) -> str:
        assert text is not None
        return text.replace("def program(", f"def {name}(")

    return None if text is None else compiled(named, gluon.jit, gl)


def _signature(source: Source) -> dict[str, Any]:
    meta, rows = source.meta, ROWS.value
    panels = [kind for kind, read in zip(source.captures, source.reads, strict=True) if read == "panel"]
    return {
        "q_desc": descriptor(source.dtype, rows, meta.head_block),
        **_of_keys(source),
        "o_desc": descriptor(source.out or source.dtype, rows, meta.value_block),
        "panel_desc": descriptor(panels[0], rows, meta.block_n) if panels else "constexpr",
        "lse": "*fp32",
        "counter": "*i32",
        "lists": "*i32" if meta.listed else "constexpr",
        "captures": tuple(f"*{kind}" for kind in source.captures),
        "strides": source.strides,
        "symbols": ("i32",) * source.symbols,
        **dict.fromkeys(_SIZES, "i32"),
        "scale": "fp32",
        **dict.fromkeys(("programs", "meta"), "constexpr"),
    }


def _of_keys(source: Source) -> dict[str, str]:
    meta, value = source.meta, source.value or source.dtype
    if not meta.narrow:
        return {
            "k_desc": descriptor(source.dtype, meta.block_n, meta.head_block),
            "v_desc": descriptor(value, meta.block_n, meta.value_block),
        }
    # half of the keys of each four, and values transposed
    k_desc = descriptor(source.dtype, meta.block_n // 4, 2, min(meta.head_block, 128))
    return {"k_desc": k_desc, "v_desc": descriptor(value, meta.value_block, meta.block_n)}


def descriptor(dtype: str, *tile: int) -> str:
    """The type of a TMA descriptor of ``[1, 1, *tile]``, as Gluon spells it."""
    block = [1, 1, *tile]
    layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"
