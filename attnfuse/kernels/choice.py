"""Which of the kernels computes a problem best: the model's seconds, corrected by what was measured on this machine."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from attnfuse.errors import NoKernel
from attnfuse.kernels.cpu import cost as cpu_cost
from attnfuse.kernels.gpu import cost as gpu_cost
from attnfuse.kernels.kernel import Kernel
from attnfuse.kernels.measured import near, rival, state
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import UNFUSED, kernels, lookup, origin, registered
from attnfuse.target import Target

__all__ = ["Candidate", "Choice", "choose", "digest", "modelled"]

log = logging.getLogger(__name__)

#: A fused node that takes so much of the unfused graph's time is as fast, and needs less memory. What is a fused call
#: already must be beaten by more than estimates err: those of flash attention in bfloat16 by up to 40%.
TIE, TIE_OF_CALLS = 1.02, 0.7


@dataclass(frozen=True)
class Candidate:
    """One kernel's answer: ``seconds`` when it can, ``reasons`` when it cannot."""

    name: str
    seconds: float | None = None
    reasons: tuple[str, ...] = ()

    def corrected(self, ratio: float) -> Candidate:
        """The same answer with its estimate multiplied."""
        return self if self.seconds is None else replace(self, seconds=ratio * self.seconds)


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
    def limit(self) -> float:
        """Seconds that count as no slower than the graph as it is."""
        return self.tie * self.seconds[UNFUSED]

    @property
    def pays(self) -> bool:
        """Whether the chosen kernel is estimated to be as fast as the graph as it is, up to ``tie``."""
        return self.seconds[self.kernel] <= self.limit


def choose(problem: Problem, target: Target, only: str | None = None, *, portable: bool = False) -> Choice:
    """The kernel with the least estimated time; with ``only`` that kernel or none, with ``portable`` one of ATen alone.

    Raises :class:`NoKernel` with each candidate's reasons, :class:`BadInput` when ``only`` is unknown.
    """
    considered = kernels() if only is None else {only: lookup(only)}
    known = near(problem, target)
    answers = (_judged(each, problem, target, portable=portable) for each in considered.values())
    candidates = tuple(each.corrected(known.ratio(each.name)) for each in answers)
    able = [(c.seconds, place) for place, c in enumerate(candidates) if c.seconds is not None]
    if not able:
        reasons = "; ".join(f"{c.name}: {', '.join(c.reasons)}" for c in candidates)
        raise NoKernel(f"no kernel can compute this attention on {target} ({reasons})")
    best = candidates[min(able)[1]].name
    tie = TIE if problem.source == "written" else TIE_OF_CALLS
    unfused = Candidate(UNFUSED, _unfused(problem, target)).corrected(known.ratio(rival(problem)))
    return Choice(best, (*candidates, unfused), tie)


def digest() -> str:
    """Of everything that a choice depends on beside the problem, for cache keys: 16 hexadecimal digits."""
    return hashlib.sha256(f"{registered()} {state()}".encode()).hexdigest()[:16]


def modelled(problem: Problem, target: Target) -> dict[str, float]:
    """The model's seconds, uncorrected, of every kernel that can, and of the graph as it is."""
    answers = (_judged(each, problem, target) for each in kernels().values())
    able = {each.name: each.seconds for each in answers if each.seconds is not None}
    return {**able, UNFUSED: _unfused(problem, target)}


def _unfused(problem: Problem, target: Target) -> float:
    written = problem.widened
    return cpu_cost.unfused(written) if target.kind == "cpu" else gpu_cost.unfused(written, target)


def _judged(each: Kernel, problem: Problem, target: Target, *, portable: bool = False) -> Candidate:
    """What a kernel answers, uncorrected. One that is not ours and fails is no candidate, and the log says so."""
    if target.kind not in each.devices:
        return Candidate(each.name, reasons=(f"runs on {', '.join(each.devices)}, not on {target.kind}",))
    if portable and not each.portable:
        return Candidate(each.name, reasons=("is not made of ATen operations alone",))
    package = origin(each)
    if package is None:
        return _answer(each, problem, target)
    try:
        return _answer(each, problem, target)
    except Exception as error:  # noqa: BLE001 - somebody else's code, and a model must compile whatever it does
        reason = f"{package} failed when asked about it with {type(error).__name__}: {error}"
        _warn(f"kernel {each.name}: {reason}")
        return Candidate(each.name, reasons=(reason,))


def _answer(each: Kernel, problem: Problem, target: Target) -> Candidate:
    reasons = each.reasons_against(problem, target)
    if isinstance(reasons, str):
        raise TypeError("refuses() returns a tuple of sentences, not one sentence")
    if reasons:
        return Candidate(each.name, reasons=tuple(reasons))
    seconds = each.cost(problem, target)
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"cost() returns seconds, not {seconds}")
    return Candidate(each.name, seconds)


@lru_cache(maxsize=256)
def _warn(text: str) -> None:
    """Once, though every attention of a model is asked about."""
    log.warning(text)
