"""What measurements are kept under: a kind of attention, and about what sizes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from attnfuse.features import Scale, features
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import UNFUSED
from attnfuse.reference import name_of
from attnfuse.score import P, text
from attnfuse.spec import AttentionSpec

__all__ = ["Case", "case_at", "case_of", "rival"]

_NUMBER = re.compile(r"\d[\d.]*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Case:
    """What measurements are kept under: a kind of attention, and logarithms of its sizes."""

    kind: str
    sizes: tuple[int, ...]

    @staticmethod
    def read(kind: str, sizes: str) -> Case:
        """A case from its kind and its sizes as text."""
        return Case(kind, tuple(map(int, sizes.split("x"))))

    @property
    def written(self) -> str:
        """The sizes as text."""
        return "x".join(map(str, self.sizes))

    def distance(self, other: Case) -> int:
        """Doublings between two cases of one kind."""
        return sum(abs(a - b) for a, b in zip(self.sizes, other.sizes, strict=True))


def case_of(problem: Problem) -> Case:
    """The case that a problem is: kernels take as long whatever its constants and its source are."""
    query, key, value = problem.query, problem.key, problem.value
    return case_at(problem.spec, query.dtype, query.shape, key.shape, value.shape, problem.training)


@lru_cache(maxsize=4096)
def case_at(
    spec: AttentionSpec,
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    training: bool = False,
) -> Case:
    """The case of a spec at these shapes."""
    when = "training" if training else "inference"
    kind = f"{_kind(spec)}, {name_of(dtype)}, {query[-1]}x{value[-1]}, {when}"
    sizes = (math.prod(query[:-2]), query[-3] / max(key[-3], 1), query[-2], key[-2])
    return Case(kind, tuple(round(math.log2(max(size, 1))) for size in sizes))


def _kind(spec: AttentionSpec) -> str:
    """The names of a spec's features, or its program without its numbers; a scale costs nothing."""
    named = features(spec)
    words = [_NUMBER.sub("#", text(spec.score))]
    if named is not None:
        words = [type(each).__name__.lower() for each in named if not isinstance(each, Scale)]
    facts = {
        "no softmax": spec.normaliser == "none",
        "dropout": spec.dropout > 0,
        "exact scores": spec.exact_scores,
        "weights": spec.weight != P,
    }
    words += [word for word, holds in facts.items() if holds]
    words += [f"[{' '.join(captured.axes)}]" for captured in spec.captures]
    return " ".join(words) or "plain"


def rival(problem: Problem) -> str:
    """The name under which the graph as it is is measured: how it is written and compiled decides what it takes."""
    return f"{UNFUSED}, {problem.source}, {'compiled' if problem.compiled else 'eager'}"
