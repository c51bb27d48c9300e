"""Whether a rewritten program computes what its source computes, by running both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree  # torch offers no public one

from attnfuse.errors import BadInput, NotEquivalent
from attnfuse.graph import facts
from attnfuse.pt2.double import run_in_double, widened
from attnfuse.pt2.sample import OTHER_SIZES, Sample, samples
from attnfuse.report import Certificate

__all__ = ["FACTOR", "check"]

#: How many times the source's own error against float64 the result's may be. Summing in another order
#: moves an error by about its own size; room is left for a maximum over few elements.
FACTOR = 4.0
#: Units in the last place, at the size of the largest exact value, that are no error at all.
FLOOR = 4.0

#: What running a program may raise: a failed assertion, a size or dtype an operator does not take.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError)


def check(source: ExportedProgram, result: ExportedProgram, *, resample: bool = True, seed: int = 0) -> Certificate:
    """Run both on inputs from :func:`attnfuse.pt2.sample.samples` and compare every output and every buffer.

    The error against float64 must be at most :data:`FACTOR` times the source's own plus a floor of
    :data:`FLOOR` units in the last place, and NaN at the same positions. Where the source has no float64
    form the two are compared with each other, by ``torch.testing``'s tolerances for their dtype.
    Programs that draw random numbers are not checked; the certificate says so. Raises :class:`NotEquivalent`.
    """
    random = next((node for node in source.graph.nodes if _is_random(node)), None)
    if random is not None:
        return Certificate(skipped=f"the program draws random numbers ({random.name})")
    tried = (_try(sample, source, result) for sample in samples(source, resample=resample, seed=seed))
    trials = [trial for trial in tried if trial is not None]
    return Certificate(
        seed=seed,
        inputs=tuple(trial.name for trial in trials),
        source_mean=max(trial.source_mean for trial in trials),
        source_max=max(trial.source_max for trial in trials),
        fused_mean=max(trial.result_mean for trial in trials),
        fused_max=max(trial.result_max for trial in trials),
    )


@dataclass(frozen=True)
class _Trial:
    """Absolute errors against float64 on one sample, the largest of all outputs."""

    name: str
    source_mean: float = 0.0
    source_max: float = 0.0
    result_mean: float = 0.0
    result_max: float = 0.0


def _is_random(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = facts.arguments(node)
    # dropout that does not drop
    return arguments.get("train", True) is not False and arguments.get("dropout_p", 1.0) != 0.0


def _try(sample: Sample, source: ExportedProgram, result: ExportedProgram) -> _Trial | None:
    """Errors of one sample; None when the source does not take it. Raises :class:`NotEquivalent`."""
    try:
        expected = _observed(source.graph_module, sample, sample.copied())
    except _FAILURES as error:
        if sample.name == OTHER_SIZES:
            return None
        raise BadInput(
            f"the program cannot be run here to verify it: {_first_line(error)}; pass --no-verify"
        ) from error
    try:
        found = _observed(result.graph_module, sample, sample.copied())
    except _FAILURES as error:
        raise NotEquivalent(f"the rewritten program fails on {sample.name}: {_first_line(error)}") from error
    exact = _exact(source.graph_module, sample)
    # bits read as another type have other shapes in float64
    if exact is None or [part.shape for part in exact] != [part.shape for part in expected]:
        exact = None
    triples = enumerate(zip(expected, found, exact or expected, strict=True))
    errors = [_errors(f"output {place} on {sample.name}", *three, direct=exact is None) for place, three in triples]
    return _Trial(sample.name, *(max(column) for column in zip(*errors, strict=True)))


def _observed(run: Callable[..., Any], sample: Sample, arguments: list[Any]) -> list[Tensor]:
    """All tensors that a run returns or may have written into."""
    with torch.no_grad():
        returned = run(*arguments)
    return [leaf for leaf in pytree.tree_leaves((returned, sample.written(arguments))) if isinstance(leaf, Tensor)]


def _exact(graph: GraphModule, sample: Sample) -> list[Tensor] | None:
    """What the source computes in float64; None when one of its operators cannot."""
    arguments = [widened(part) for part in sample.copied()]
    try:
        return _observed(lambda *parts: run_in_double(graph, parts), sample, arguments)
    except _FAILURES:
        return None


def _errors(what: str, source: Tensor, result: Tensor, exact: Tensor, *, direct: bool) -> tuple[float, ...]:
    """Mean and maximum error of source and result. Raises :class:`NotEquivalent`."""
    if source.shape != result.shape or source.dtype != result.dtype:
        raise NotEquivalent(f"{what} is {_kind(result)} instead of {_kind(source)}")
    if direct:
        return _compared_directly(what, source, result)
    # a result may be more exact than the source: finite where the source alone overflowed
    if bool((result.isnan() & ~source.isnan()).any() | (exact.isnan() & ~result.isnan()).any()):
        raise NotEquivalent(f"{what} is NaN at other positions than in the source")
    by_source, by_result = _distance(source, exact), _distance(result, exact)
    floor = _floor(source, exact)
    for measure in (torch.mean, torch.max):
        if measure(by_result) > FACTOR * measure(by_source) + floor:
            raise NotEquivalent(
                f"{what} is off by {float(measure(by_result)):.2g} ({measure.__name__}) against float64, "
                f"the source by {float(measure(by_source)):.2g}"
            )
    return tuple(float(measure(error)) for error in (by_source, by_result) for measure in (torch.mean, torch.max))


def _compared_directly(what: str, source: Tensor, result: Tensor) -> tuple[float, ...]:
    try:
        torch.testing.assert_close(result, source, equal_nan=True)
    except AssertionError as error:
        raise NotEquivalent(f"{what}: {_first_line(error)}") from error
    distance = _distance(result, source)
    return 0.0, 0.0, float(distance.mean()), float(distance.max())


def _distance(tensor: Tensor, exact: Tensor) -> Tensor:
    """Absolute errors where both are finite, 0 where they are the same infinity or NaN, as float64."""
    left, right = (part.double() for part in (tensor, exact))
    distance = (left - right).abs()
    same = (left == right) | left.isnan() | right.isnan()
    return torch.where(same, 0.0, distance).reshape(-1) if distance.numel() else distance.new_zeros(1)


def _floor(source: Tensor, exact: Tensor) -> float:
    if not source.is_floating_point() or not exact.numel():
        return 0.0
    finite = exact.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return FLOOR * torch.finfo(source.dtype).eps * float(finite)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
