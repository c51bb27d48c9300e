"""How a score program's captures are read: what varies along rows or keys alone is not read score by score."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.score import Capture, Const, Expr, Index, Symbol, apply, rewrite, walk
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["given", "only_of", "reads_along_keys", "reads_of"]

_PANELS = (torch.bfloat16, torch.float16, torch.float32)


def reads_of(
    spec: AttentionSpec,
    program: Expr,
    strides: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    *,
    panels: bool = True,
) -> tuple[str, ...]:
    """For each capture ``"row"``, ``"key"``, ``"score"`` or, for at most one, ``"panel"``; ``""`` where none reads it.

    A panel is what TMA can load: halves or floats whose rows are contiguous and whose strides are of 16 bytes. None is
    read where columns of scores are not in the order of keys, as of float8.
    """
    used = {part.slot for part in walk(program) if isinstance(part, Capture)}
    found = [_read(each) if slot in used else "" for slot, each in enumerate(spec.captures)]
    fits = (slot for slot, read in enumerate(found) if read == "score" and _is_panel(strides[slot], dtypes[slot]))
    first = next(fits, None) if panels else None
    return tuple("panel" if slot == first else read for slot, read in enumerate(found))


def only_of(program: Expr, reads: tuple[str, ...]) -> tuple[str, ...]:
    """``reads`` of the captures that ``program`` reads."""
    used = {part.slot for part in walk(program) if isinstance(part, Capture)}
    return tuple(read if slot in used else "" for slot, read in enumerate(reads))


def reads_along_keys(program: Expr, captures: Sequence[Captured]) -> bool:
    """Whether a program reads, beside scores, anything that differs from key to key."""
    return any(
        part == Index("n") or (isinstance(part, Capture) and "n" in captures[part.slot].axes) for part in walk(program)
    )


def _read(captured: Captured) -> str:
    match ("m" in captured.axes, "n" in captured.axes):
        case (_, False):
            return "row"
        case (False, True):
            return "key"
    return "score"


def _is_panel(strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    return (
        dtype in _PANELS
        and strides[-1] == 1
        and all(stride > 0 and stride * dtype.itemsize % 16 == 0 for stride in strides[:-1])
    )


def given(program: Expr, captures: tuple[Captured, ...], symbols: int) -> Expr:
    """``program`` with the value of capture ``k`` as symbol ``symbols + k``, of the same kind."""

    def rule(part: Expr) -> Expr:
        if not isinstance(part, Capture):
            return part
        value = Symbol(symbols + part.slot)
        match captures[part.slot].kind:
            case "bool":
                return apply("ne", value, Const(0))
            case "int":
                return value
        return apply("float", value)

    return rewrite(program, rule)
