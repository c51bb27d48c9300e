"""What is tuned for where no program is named: attention as most models have it, at a few sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from attnfuse.candidates import Asked, Sizes, problem_of
from attnfuse.features import describe
from attnfuse.reference import name_of
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec, Captured
from attnfuse.target import Target

__all__ = ["standard"]


def _spec(score: str, *captures: Captured) -> AttentionSpec:
    return AttentionSpec(parse(score), captures=captures)


_PLAIN = _spec("0.125 * s")
#: What differs in what kernels do: masks that skip tiles, programs in the tile, tensors read score by score.
SPECS = (
    _PLAIN,
    _spec("where(n <= m, 0.125 * s, -inf)"),
    _spec("where((n <= m) & (n >= m - 256), 0.125 * s, -inf)"),
    _spec("where(n <= m, 30.0 * tanh(0.125 * s / 30.0), -inf)"),
    _spec("where(n <= m, 0.125 * s + t0 * (n - m), -inf)", Captured(("h",), "float32")),
    _spec("0.125 * s + t0", Captured(("h", "m", "n"), "float32")),
)


@dataclass(frozen=True)
class Set:
    """Sizes of whole sequences, for every spec; of one new row, for the plain one; and dtypes."""

    sequences: tuple[Sizes, ...]
    decoding: tuple[Sizes, ...]
    dtypes: tuple[torch.dtype, ...]


_ON_CPU = Set(
    (Sizes(1, 8, 8, 512, 512, 64), Sizes(1, 8, 8, 2048, 2048, 64)),
    (Sizes(1, 32, 8, 1, 2048, 64),),
    (torch.float32, torch.bfloat16),
)
_ON_GPU = Set(
    tuple(Sizes(4, 16, 16, length, length, width) for width in (64, 128) for length in (1024, 4096)),
    (Sizes(8, 32, 8, 1, 8192, 128),),
    (torch.bfloat16,),
)


def standard(target: Target) -> Iterator[Asked]:
    """The problems that are usual on a target."""
    chosen = _ON_CPU if target.kind == "cpu" else _ON_GPU
    for dtype in chosen.dtypes:
        for spec in SPECS:
            for sizes in (*chosen.sequences, *(chosen.decoding if spec is _PLAIN else ())):
                captures = tuple(replace(each, dtype=name_of(dtype)) for each in spec.captures)
                problem = problem_of(replace(spec, captures=captures).to_text(), sizes, dtype)
                yield Asked(describe(spec), problem, target)
