"""Which types a GPU multiplies where operands are float8, and which it can read at all."""

from __future__ import annotations

import torch

from attnfuse.axes import Minor
from attnfuse.form import weight_factor
from attnfuse.reference import is_float8, name_of, out_dtype
from attnfuse.spec import AttentionSpec, axes_of
from attnfuse.target import Target

__all__ = ["HEADROOM", "product_types", "quantised_to", "readable"]

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
#: Targets whose units sum float8 over the contiguous dimension alone.
_SUMS_CONTIGUOUS = "cuda:sm9"
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


def quantised_to(target: Target) -> torch.dtype | None:
    """The type that what is not float8 may be rounded to, the finer one; None where no units multiply it."""
    units = _first(_UNITS, target)
    return next((dtype for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz) if dtype in units), None)


def product_types(
    spec: AttentionSpec, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], target: Target, minor: Minor = "n"
) -> tuple[torch.dtype, torch.dtype]:
    """The types in which query is multiplied with key, and weights with value; ``minor`` says how value lies.

    A product of float8 is as exact as one of bfloat16, but summed less exactly (Hopper keeps 14 bits): it is taken
    where the result is of a half type. Weights are rounded to float8 only where the spec lets them be, no factor of
    each key could take them out of its range, and it pays. Hopper multiplies float8 summed over what is contiguous
    alone: to turn rows of values byte by byte in each tile takes longer than their product in bfloat16 (one H200: 16.8
    ms against 9.0 ms).
    """
    query, key, value = dtypes
    units = _first(_UNITS, target)
    out = out_dtype(spec, value)
    wide = next((each for each in (query, key) if not is_float8(each)), torch.bfloat16)
    narrow = query == key and query in units and out.itemsize == 2
    fits = minor == "n" or not str(target).startswith(_SUMS_CONTIGUOUS)
    allowed = name_of(value) == spec.weight_dtype and not _varies_along_keys(spec)
    rounded = allowed and fits and value in units and out.itemsize == 2
    return query if narrow else wide, value if rounded or not is_float8(value) else out


def _varies_along_keys(spec: AttentionSpec) -> bool:
    factor = weight_factor(spec.weight)
    return factor is None or "n" in axes_of(factor, spec.captures)


def _first(table: tuple[tuple[str, frozenset[torch.dtype]], ...], target: Target) -> frozenset[torch.dtype]:
    return next((found for name, found in table if str(target).startswith(name)), frozenset())
