"""The certificate of one site: errors against float64 of the source and of its replacement, on each trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnfuse.graph.double import run_in_double, widened
from attnfuse.passes.certify.inputs import TRIALS, Trial, draw
from attnfuse.passes.certify.errors import Errors, compare
from attnfuse.passes.certify.source import source_of
from attnfuse.report import Certificate

__all__ = ["Effort", "Replay", "certify"]

Effort = Literal["full", "quick", "off"]

#: Scores of a site beyond which it is not replayed: a replay takes about 0.1 s for a million of them.
_MOST_SCORES: dict[Effort, int] = {"full": 2**26, "quick": 2**20}

_SEED = 0


@dataclass(frozen=True)
class Replay:
    """What is replayed: ``replacement`` computes ``result`` from ``inputs``, of which ``needs`` says which need
    a gradient."""

    result: Node
    inputs: tuple[Node, ...]
    needs: tuple[bool, ...]
    replacement: GraphModule
    is_random: bool


def certify(plan: Replay, scores: int, effort: Effort) -> Certificate:
    """Replays a site's source beside its replacement on every trial.

    Raises :class:`NotEquivalent` where the replacement errs more than the contract allows: at most
    ``4 x`` the source's own error plus 8 units in the last place, on mean and maximum, NaN at the same places. The
    gradients of the inputs that need one are held to the same.
    """
    if reason := _excuse(plan, scores, effort):
        return Certificate(skipped=reason)
    source, standing = source_of(plan.result, plan.inputs)
    trials = [_try(name, trial, source, standing, plan) for name, trial in TRIALS]
    return Certificate(
        seed=_SEED,
        inputs=tuple(name for name, _ in TRIALS),
        source_mean=max(t.source_mean for t in trials),
        source_max=max(t.source_max for t in trials),
        fused_mean=max(t.fused_mean for t in trials),
        fused_max=max(t.fused_max for t in trials),
    )


def _excuse(plan: Replay, scores: int, effort: Effort) -> str:
    if effort == "off":
        return "switched off"
    if plan.is_random:
        return "the site drops weights at random"
    if scores > _MOST_SCORES[effort]:
        return f"{scores} scores are more than {effort} replays"
    return ""


def _try(name: str, trial: Trial, source: GraphModule, standing: Sequence[Node], plan: Replay) -> Errors:
    generator = torch.Generator().manual_seed(_SEED)
    values = [draw(node, trial, generator) for node in standing]
    shared = values[: len(plan.inputs)]
    needs = [need and at < len(shared) for at, need in enumerate(_padded(plan.needs, len(values)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _observed(source, values, needs)
        found = _observed(plan.replacement, shared, needs[: len(shared)])
        exact = _observed(partial(_in_double, source), [widened(value) for value in values], needs)
    names = ["the result", *(f"the gradient of {n.name}" for n, need in zip(standing, needs, strict=True) if need)]
    compared = map(compare, (f"{which} on {name} inputs" for which in names), expected, found, exact)
    return next(iter(list(compared)))


def _padded(needs: Sequence[bool], length: int) -> list[bool]:
    return [*needs, *[False] * (length - len(needs))]


def _in_double(source: GraphModule, *values: Tensor | int) -> Tensor:
    out: Tensor = run_in_double(source, values)
    return out


def _observed(run: Callable[..., Tensor], values: Sequence[Tensor | int], needs: Sequence[bool]) -> list[Tensor]:
    """The result on copies of ``values``, and the gradients that a weighted sum of it has for those that need one."""
    copies = [_copied(value, need) for value, need in zip(values, needs, strict=True)]
    leaves = [copy for copy, need in zip(copies, needs, strict=True) if need and isinstance(copy, Tensor)]
    with torch.set_grad_enabled(bool(leaves)):
        # in-place steps of the source may write into its inputs, which autograd forbids for leaves
        out = run(*(copy * 1 if isinstance(copy, Tensor) and copy.requires_grad else copy for copy in copies))
    if not leaves:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights, materialize_grads=True)]


def _copied(value: Tensor | int, need: bool) -> Tensor | int:
    return value.clone().requires_grad_(need) if isinstance(value, Tensor) else value
