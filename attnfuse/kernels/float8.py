"""Which types a GPU multiplies where operands are float8, and which it can read at all."""

from __future__ import annotations

import torch

from attnfuse.reference import is_float8, out_dtype
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["HEADROOM", "product_types", "readable"]

_OCP = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))
_FNUZ = frozenset((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))

#: The float8 types that matrix units multiply, by the beginning of ``str(target)``; the first that fits.
_UNITS = (
    *((f"cuda:sm{number}", _OCP) for number in (89, 9, 10, 12)),
    ("rocm:gfx942", _FNUZ),
    ("rocm:gfx950", _OCP),
    # Triton's interpreter
    ("cpu", _OCP | _FNUZ),
)
#: Those that compilers can widen; none where NVIDIA's units know none.
_READABLE = (
    *((name, frozenset[torch.dtype]()) for name in ("cuda:sm7", "cuda:sm80", "cuda:sm86", "cuda:sm87")),
    ("cuda", _OCP),
    ("rocm", _OCP | _FNUZ),
    ("xpu", _OCP),
)

#: Weights of at most one are multiplied by two to this before they are rounded: the largest power below the largest
#: number of the type.
HEADROOM = {
    torch.float8_e4m3fn: 8.0,
    torch.float8_e4m3fnuz: 7.0,
    torch.float8_e5m2: 15.0,
    torch.float8_e5m2fnuz: 15.0,
}


def readable(target: Target) -> frozenset[torch.dtype]:
    """The float8 types that operands may have on a target."""
    return _first(_READABLE, target)


def product_types(
    spec: AttentionSpec, query: torch.dtype, key: torch.dtype, value: torch.dtype, target: Target
) -> tuple[torch.dtype, torch.dtype]:
    """The types in which query is multiplied with key, and weights with value.

    A product of float8 is as exact as one of bfloat16, but summed less exactly (Hopper keeps 14 bits): it is taken
    where the result is of a half type. Weights are rounded to float8 only where the spec lets them be.
    """
    units = _first(_UNITS, target)
    out = out_dtype(spec, value)
    wide = next((each for each in (query, key) if not is_float8(each)), torch.bfloat16)
    narrow = query == key and query in units and out.itemsize == 2
    rounded = str(value).removeprefix("torch.") == spec.weight_dtype and value in units and out.itemsize == 2
    return query if narrow else wide, value if rounded or not is_float8(value) else out


def _first(table: tuple[tuple[str, frozenset[torch.dtype]], ...], target: Target) -> frozenset[torch.dtype]:
    return next((found for name, found in table if str(target).startswith(name)), frozenset())
