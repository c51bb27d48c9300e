"""The certificate of one site: errors against float64 of the source and of its replacement, on each trial."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnfuse.errors import NotEquivalent
from attnfuse.graph.double import run_in_double, widened
from attnfuse.passes.certify.inputs import TRIALS, Trial, draw
from attnfuse.passes.certify.source import source_of
from attnfuse.report import Certificate

__all__ = ["Effort", "certify"]

Effort = Literal["full", "quick", "off"]

#: Scores of a site beyond which it is not replayed: a replay takes about 0.1 s for a million of them.
_MOST_SCORES: dict[Effort, int] = {"full": 2**26, "quick": 2**20}

#: The replacement may err this many times as much as the source: summing in another order moves an
#: error by about its own size, and a maximum over few elements is a noisy estimate.
_FACTOR = 4.0

#: Units in the last place at the largest exact value that are no error: the source may be exact by luck.
_FLOOR = 8.0

_SEED = 0


def certify(
    result: Node, inputs: Sequence[Node], replacement: GraphModule, scores: int, effort: Effort, is_random: bool
) -> Certificate:
    """Replays the source of ``result`` against ``replacement``, both functions of ``inputs``.

    Raises :class:`NotEquivalent` where the replacement errs more than the contract allows: at most
    ``4 x`` the source's own error plus 8 units in the last place, on mean and maximum, NaN at the same places.
    """
    if reason := _excuse(scores, effort, is_random):
        return Certificate(skipped=reason)
    source, standing = source_of(result, inputs)
    trials = [_try(name, trial, source, standing, replacement, len(inputs)) for name, trial in TRIALS]
    return Certificate(
        seed=_SEED,
        inputs=tuple(name for name, _ in TRIALS),
        source_mean=max(t.source[0] for t in trials),
        source_max=max(t.source[1] for t in trials),
        fused_mean=max(t.fused[0] for t in trials),
        fused_max=max(t.fused[1] for t in trials),
    )


def _excuse(scores: int, effort: Effort, is_random: bool) -> str:
    if effort == "off":
        return "switched off"
    if is_random:
        return "the site drops weights at random"
    if scores > _MOST_SCORES[effort]:
        return f"{scores} scores are more than {effort} replays"
    return ""


@dataclass(frozen=True)
class _Errors:
    """Mean and maximum absolute error of the source and of the replacement."""

    source: tuple[float, float]
    fused: tuple[float, float]


def _try(
    name: str, trial: Trial, source: GraphModule, standing: Sequence[Node], replacement: GraphModule, shared: int
) -> _Errors:
    generator = torch.Generator().manual_seed(_SEED)
    values = [draw(node, trial, generator) for node in standing]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = source(*map(_copied, values))
        found = replacement(*values[:shared])
        exact = run_in_double(source, [widened(_copied(value)) for value in values])
    return _compared(name, expected, found, exact)


def _copied(value: Tensor | int) -> Tensor | int:
    return value.clone() if isinstance(value, Tensor) else value


def _compared(name: str, expected: Tensor, found: Tensor, exact: Tensor) -> _Errors:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        kinds = (f"{t.dtype}{list(t.shape)}" for t in (found, expected))
        raise NotEquivalent("the fused node is {} instead of {}".format(*kinds))
    repaired = found.isfinite() & exact.isfinite()
    if bool(((found.isnan() != expected.isnan()) & ~repaired).any()):
        raise NotEquivalent(f"NaN at other places than in the source on {name} inputs")
    theirs, ours = _errors(expected, exact), _errors(found, exact)
    floor = _FLOOR * torch.finfo(expected.dtype).eps * _largest(exact)
    for which, (own, other) in zip(("mean", "maximum"), zip(ours, theirs, strict=True), strict=True):
        if not own <= _FACTOR * other + floor:
            raise NotEquivalent(f"{which} error {own:.2g} on {name} inputs, where the source's is {other:.2g}")
    return _Errors(theirs, ours)


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    off = (got.double() - exact).abs()[exact.isfinite() & ~got.isnan()]
    return (off.mean().item(), off.max().item()) if off.numel() else (0.0, 0.0)


def _largest(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0

