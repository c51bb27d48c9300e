"""Which kernels exist, and which of them computes a problem best.

A third party adds kernels through the entry point group ``attnfuse.kernels``: each entry names a module
whose import runs ``@kernel``, or a :class:`Kernel` subclass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TypeVar

from attnfuse.errors import BadInput, NoKernel
from attnfuse.kernels import cost
from attnfuse.kernels.gpu import cost as gpu_cost
from attnfuse.kernels.kernel import Kernel
from attnfuse.kernels.problem import Problem
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = ["UNFUSED", "Candidate", "Choice", "choose", "digest", "kernel", "kernels", "lookup"]

#: The name that the unfused graph has among the candidates.
UNFUSED = "unfused"
GROUP = "attnfuse.kernels"
#: A fused node that takes so much of the unfused graph's time is as fast, and needs less memory. What is a fused call
#: already must be beaten by more than estimates err: those of flash attention in bfloat16 by up to 40%.
TIE, TIE_OF_CALLS = 1.02, 0.7

_KERNELS: dict[str, Kernel] = {}
K = TypeVar("K", bound=type[Kernel])


@dataclass(frozen=True)
class Candidate:
    """One kernel's answer: ``seconds`` when it can, ``reasons`` when it cannot."""

    name: str
    seconds: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The fastest kernel for a problem, and every candidate, in registration order, ``unfused`` last."""

    kernel: str
    candidates: tuple[Candidate, ...]
    tie: float = TIE

    @property
    def seconds(self) -> dict[str, float]:
        """The estimate of every candidate that can."""
        return {c.name: c.seconds for c in self.candidates if c.seconds is not None}

    @property
    def pays(self) -> bool:
        """Whether the chosen kernel is estimated to be as fast as the graph as it is, up to ``tie``."""
        return self.seconds[self.kernel] <= self.tie * self.seconds[UNFUSED]


def kernel(cls: K) -> K:
    """Class decorator: registers one instance of a :class:`Kernel` under its name. Raises :class:`BadInput`."""
    known = _KERNELS.get(cls.name)
    if cls.name == UNFUSED or (known is not None and type(known).__qualname__ != cls.__qualname__):
        raise BadInput(f"there already is a kernel called {cls.name!r}")
    _KERNELS[cls.name] = cls()
    return cls


def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name: attnfuse's own in the order of preference, then those of entry points."""
    _load_entry_points()
    return MappingProxyType(_KERNELS)


@lru_cache(maxsize=1)
def _load_entry_points() -> None:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        loaded = entry.load()
        if isinstance(loaded, type) and issubclass(loaded, Kernel) and loaded.name not in _KERNELS:
            kernel(loaded)


def lookup(name: str) -> Kernel:
    """The kernel of that name. Raises :class:`BadInput`, naming those there are."""
    if name in _KERNELS:
        return _KERNELS[name]
    if name in kernels():
        return _KERNELS[name]
    raise BadInput(f"there is no kernel {name!r}; there are {', '.join(_KERNELS)}")


def digest() -> str:
    """A hash of this version and the kernels' names, for cache keys: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join([__version__, *sorted(kernels())]).encode()).hexdigest()[:16]


def choose(problem: Problem, target: Target, only: str | None = None, *, portable: bool = False) -> Choice:
    """The kernel with the least estimated time; with ``only`` that kernel or none, with ``portable`` one of ATen alone.

    Raises :class:`NoKernel` with each candidate's reasons, :class:`BadInput` when ``only`` is unknown.
    """
    considered = kernels() if only is None else {only: lookup(only)}
    candidates = tuple(_candidate(each, problem, target, portable=portable) for each in considered.values())
    able = [(c.seconds, place) for place, c in enumerate(candidates) if c.seconds is not None]
    if not able:
        reasons = "; ".join(f"{c.name}: {', '.join(c.reasons)}" for c in candidates)
        raise NoKernel(f"no kernel can compute this attention on {target} ({reasons})")
    best = candidates[min(able)[1]].name
    tie = TIE if problem.source == "written" else TIE_OF_CALLS
    return Choice(best, (*candidates, Candidate(UNFUSED, _unfused(problem, target))), tie)


def _unfused(problem: Problem, target: Target) -> float:
    return cost.unfused(problem) if target.kind == "cpu" else gpu_cost.unfused(problem, target)


def _candidate(each: Kernel, problem: Problem, target: Target, *, portable: bool) -> Candidate:
    if target.kind not in each.devices:
        return Candidate(each.name, reasons=(f"runs on {', '.join(each.devices)}, not on {target.kind}",))
    if portable and not each.portable:
        return Candidate(each.name, reasons=("is not made of ATen operations alone",))
    if reasons := each.reasons_against(problem, target):
        return Candidate(each.name, reasons=reasons)
    return Candidate(each.name, each.cost(problem, target))
