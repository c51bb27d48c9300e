"""Whether a rewritten program computes what its source computes, by running both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree  # torch offers no public one

from attnfuse.errors import BadInput, NotEquivalent
from attnfuse.graph import facts
from attnfuse.graph.double import run_in_double, widened
from attnfuse.passes.certify import Errors, compare
from attnfuse.pt2.sample import OTHER_SIZES, Sample, samples
from attnfuse.report import Certificate

__all__ = ["check"]

#: What running a program may raise: a failed assertion, a size or dtype an operator does not take.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError)


def check(source: ExportedProgram, result: ExportedProgram, *, resample: bool = True, seed: int = 0) -> Certificate:
    """Run both on inputs from :func:`attnfuse.pt2.sample.samples` and compare every output and every buffer.

    Floating-point results are held to :func:`attnfuse.passes.certify.compare`, the rule of every single
    fusion: as exact as the source against float64. Where the source has no float64 form the two are
    compared with each other, by ``torch.testing``'s tolerances for their dtype; other results must be equal.
    Programs that draw random numbers are not checked; the certificate says so. Raises :class:`NotEquivalent`.
    """
    random = next((node for node in source.graph.nodes if _is_random(node)), None)
    if random is not None:
        return Certificate(skipped=f"the program draws random numbers ({random.name})")
    tried = {sample.name: _try(sample, source, result) for sample in samples(source, resample=resample, seed=seed)}
    found = {name: errors for name, errors in tried.items() if errors is not None}
    every = [error for errors in found.values() for error in errors] or [Errors(0.0, 0.0, 0.0, 0.0)]
    return Certificate(
        seed=seed,
        inputs=tuple(found),
        source_mean=max(error.source_mean for error in every),
        source_max=max(error.source_max for error in every),
        fused_mean=max(error.fused_mean for error in every),
        fused_max=max(error.fused_max for error in every),
    )


def _is_random(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = facts.arguments(node)
    # dropout that does not drop
    return arguments.get("train", True) is not False and arguments.get("dropout_p", 1.0) != 0.0


def _try(sample: Sample, source: ExportedProgram, result: ExportedProgram) -> list[Errors] | None:
    """Errors of each result on one sample; None when the source does not take it. Raises :class:`NotEquivalent`."""
    try:
        expected = _observed(source.graph_module, sample, sample.copied())
    except _FAILURES as error:
        if sample.name == OTHER_SIZES:
            return None
        raise BadInput(f"the program cannot be run here to verify it: {_why(error)}; pass --no-verify") from error
    try:
        found = _observed(result.graph_module, sample, sample.copied())
    except _FAILURES as error:
        raise NotEquivalent(f"the rewritten program fails on {sample.name}: {_why(error)}") from error
    exact = _exact(source.graph_module, sample, expected)
    triples = enumerate(zip(expected, found, exact, strict=True))
    return [_errors(f"output {place} on {sample.name}", *three) for place, three in triples]


def _observed(run: Callable[..., Any], sample: Sample, arguments: list[Any]) -> list[Tensor]:
    """All tensors that a run returns or may have written into."""
    with torch.no_grad():
        returned = run(*arguments)
    return [leaf for leaf in pytree.tree_leaves((returned, sample.written(arguments))) if isinstance(leaf, Tensor)]


def _exact(graph: GraphModule, sample: Sample, expected: list[Tensor]) -> list[Tensor | None]:
    """What the source computes in float64; None where it cannot: an operator has no such form, or the bits of a
    float are looked at.
    """
    arguments = [widened(part) for part in sample.copied()]
    try:
        exact = _observed(lambda *parts: run_in_double(graph, parts), sample, arguments)
    except _FAILURES:
        return [None] * len(expected)
    pairs = zip(exact, expected, strict=True)
    return [each if each.shape == other.shape and each.is_floating_point() else None for each, other in pairs]


def _errors(what: str, source: Tensor, result: Tensor, exact: Tensor | None) -> Errors:
    if exact is not None and source.is_floating_point():
        return compare(what, source, result, exact)
    try:
        torch.testing.assert_close(result, source, equal_nan=True)
    except AssertionError as error:
        raise NotEquivalent(f"{what}: {_why(error)}") from error
    return Errors(0.0, 0.0, 0.0, 0.0)


def _why(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
