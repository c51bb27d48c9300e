"""The certificate of one site: errors against float64 of the source and of its replacement, on each trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnfuse.errors import Refused
from attnfuse.graph.double import nudged, otherwise_rounded, run_in_double, widened
from attnfuse.graph.text import shape_of
from attnfuse.passes.certify.errors import Errors, compare
from attnfuse.passes.certify.inputs import GRADIENT_FREE, TRIALS, Mask, Trial, draw
from attnfuse.passes.certify.modes import entered, within
from attnfuse.passes.certify.shrink import Shaped, Sizes, shrunk_shape, smaller_axes
from attnfuse.passes.certify.source import Shapes, fused_of, independent, source_of
from attnfuse.passes.site import Attention
from attnfuse.report import Certificate
from attnfuse.score import Apply, Capture, Const, Expr

__all__ = ["Effort", "Replay", "certify"]

Effort = Literal["full", "quick", "off"]

#: A site with more scores is replayed at smaller sizes; a replay takes about 0.1 s for a million of them.
_MOST_SCORES: dict[Effort, int] = {"full": 2**24, "quick": 2**18}

_SEED = 0


@dataclass(frozen=True)
class Replay:
    """What is replayed: ``replacement``, and ``at_sizes(sizes)`` at other sizes, computes ``attention.site.node``
    from ``inputs``, of which ``needs`` says which need a gradient; ``scores`` is how many scores the site has, and
    ``constant`` the value of a node that has only one. ``faithful`` asks for the source's rows that keep no key.
    """

    attention: Attention
    inputs: tuple[Node, ...]
    needs: tuple[bool, ...]
    replacement: GraphModule
    at_sizes: Callable[[Sizes], GraphModule]
    scores: int
    constant: Callable[[Node], Tensor | None] = lambda node: None
    faithful: bool = True


def certify(replay: Replay, effort: Effort, known: dict[str, Certificate]) -> Certificate:
    """Replays a site's source beside its replacement on every trial; a site equal to a ``known`` one not again.

    Raises :class:`NotEquivalent` where the replacement errs more than the contract allows: at most
    ``4 x`` the source's own error plus 8 units in the last place, on mean and maximum, NaN at the same places. The
    gradients of the inputs that need one are held to the same. Raises :class:`Refused` where the source cannot be run.
    """
    if effort == "off":
        return Certificate(skipped="switched off")
    if replay.attention.spec.dropout:
        return Certificate(skipped="the site drops weights at random")
    pair = _at_full_size(replay) if replay.scores <= _MOST_SCORES[effort] else _at_small_size(replay)
    key = f"{shape_of(pair.source.graph)}\n{shape_of(pair.fused.graph)}\n{pair.needs}"
    if key not in known:
        known[key] = _replayed(pair)
    return known[key]


@dataclass(frozen=True)
class _Pair:
    """The source and the fused graph; the inputs of fused are the first of source's, whose shapes are given.

    ``rounding`` is what the fused graph rounds its operands by, on request.
    """

    source: GraphModule
    fused: GraphModule
    standing: tuple[Node, ...]
    needs: tuple[bool, ...]
    shapes: Shapes
    masks: Mapping[Node, Mask]
    constant: Callable[[Node], Tensor | None]
    rounding: float

    @property
    def shared(self) -> int:
        return len(self.needs)


def _at_full_size(replay: Replay) -> _Pair:
    return _pair(replay, replay.replacement, {})


def _at_small_size(replay: Replay) -> _Pair:
    sizes, site = smaller_axes(replay.attention), replay.attention.site
    return _pair(replay, replay.at_sizes(sizes), {n: shrunk_shape(n, place, sizes) for n, place in site.reads.items()})


def _pair(replay: Replay, replacement: GraphModule, shapes: Shapes) -> _Pair:
    inputs = independent(replay.inputs)
    source, standing = source_of(replay.attention.site.node, inputs, shapes)
    fused = within(entered(replay.attention.site.node), fused_of(replacement, replay.inputs, inputs, shapes))
    needs = tuple(need for node, need in zip(replay.inputs, replay.needs, strict=True) if node in inputs)
    masks, rounding = _masks(replay), _rounding(replay.attention)
    return _Pair(source, fused, standing, needs, shapes, masks, replay.constant, rounding)


def _rounding(attention: Attention) -> float:
    return torch.finfo(getattr(torch, str(attention.spec.weight_dtype))).eps if attention.quantised else 0.0


def _masks(replay: Replay) -> Mapping[Node, Mask]:
    """The captures that are added to the scores of a softmax, and are not also query, key or value."""
    attention = replay.attention
    if attention.spec.normaliser == "none":
        # the lowest number is no mask there, but one to overflow
        return {}
    operands = {leaf.node for layout in attention.operands for leaf in layout.views}
    added = (attention.captures[slot] for slot in _summands(attention.spec.score))
    which: Mask = "any" if replay.faithful else "finite"
    return {leaf.node: which for layout in added for leaf in layout.views if leaf.node not in operands}


def _summands(score: Expr) -> frozenset[int]:
    """The slots of captures that a score is a sum of."""
    match score:
        case Capture(slot):
            return frozenset((slot,))
        case Apply("add", (a, b)) | Apply("where", (_, a, b)):
            return _summands(a) | _summands(b)
        case Apply("mul", (Const(factor), x)) if 0 < factor <= 1:
            return _summands(x)
    return frozenset()


def _replayed(pair: _Pair) -> Certificate:
    if pair.shapes and (reason := _misfit(pair)):
        return Certificate(skipped=f"too many scores to replay, and not at smaller sizes: {reason}")
    # logits far apart are a choice, which any rounding of operands may tip
    chosen = [(name, trial) for name, trial in TRIALS if not (pair.rounding and trial in GRADIENT_FREE)]
    trials = [_try(name, trial, pair) for name, trial in chosen]
    return Certificate(
        seed=_SEED,
        inputs=tuple(name for name, _ in chosen),
        source_mean=max(t.source_mean for t in trials),
        source_max=max(t.source_max for t in trials),
        fused_mean=max(t.fused_mean for t in trials),
        fused_max=max(t.fused_max for t in trials),
        shape=", ".join(str(list(pair.shapes[n])) for n in pair.standing[: pair.shared]) if pair.shapes else "",
    )


def _misfit(pair: _Pair) -> str:
    """Why the source does not run at the smaller sizes; empty when it does and every shape is the predicted one."""
    try:
        with torch.no_grad():
            Shaped(pair.source).run(*_drawn(pair, TRIALS[0][1]))
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return ""


def _drawn(pair: _Pair, trial: Trial) -> list[Tensor | int]:
    generator = torch.Generator().manual_seed(_SEED)
    return [_value(node, pair, trial, generator) for node in pair.standing]


def _value(node: Node, pair: _Pair, trial: Trial, generator: torch.Generator) -> Tensor | int:
    shape, constant = pair.shapes.get(node), pair.constant(node)
    if constant is None:
        return draw(node, shape, pair.masks.get(node, "none"), trial, generator)
    # at smaller sizes the source reads a smaller part of it, from the same start
    return constant.detach()[tuple(map(slice, constant.shape if shape is None else shape))]


def _try(name: str, trial: Trial, pair: _Pair) -> Errors:
    values = _drawn(pair, trial)
    # logits far apart make gradients ill-conditioned: the source's own error on a few rows is luck
    asked = pair.needs if trial not in GRADIENT_FREE else [False] * pair.shared
    needs = [*asked, *[False] * (len(values) - pair.shared)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _expected(pair, values, needs)
        found = _observed(pair.fused, values[: pair.shared], needs[: pair.shared])
        exact = _exactly(pair, [widened(value) for value in values], needs)
        moved = otherwise_rounded(lambda random: _exactly(pair, _nudged(pair, values, random), needs, random))
    differentiated = (node for node, need in zip(pair.standing, needs, strict=True) if need)
    names = ["the result", *(f"the gradient of {node.name}" for node in differentiated)]
    errors = [
        compare(
            f"{which} on {name} inputs",
            source,
            fused,
            truth,
            [partial(_nth, each, at) for each in moved],
            pair.rounding,
        )
        for at, (which, source, fused, truth) in enumerate(zip(names, expected, found, exact, strict=True))
    ]
    return errors[0]


def _nudged(pair: _Pair, values: Sequence[Tensor | int], random: torch.Generator) -> list[Tensor | int]:
    """The inputs one rounding away, in float64; but for masks, whose fills are exact and far too big to be moved."""
    return [
        widened(value) if node in pair.masks else nudged(value, random)
        for node, value in zip(pair.standing, values, strict=True)
    ]


def _expected(pair: _Pair, values: Sequence[Tensor | int], needs: Sequence[bool]) -> list[Tensor]:
    try:
        return _observed(pair.source, values, needs)
    except RuntimeError as error:
        raise Refused(f"the program itself fails: {str(error).partition(chr(10))[0]}") from error


def _nth(results: Callable[[], list[Tensor]], at: int) -> Tensor:
    return results()[at]


def _exactly(
    pair: _Pair, values: Sequence[Tensor | int], needs: Sequence[bool], random: torch.Generator | None = None
) -> list[Tensor]:
    """What the source gives in float64; with ``random``, rounded after each step by chance."""
    return _observed(lambda *given: cast("Tensor", run_in_double(pair.source, given, random)), values, needs)


def _observed(run: Callable[..., Tensor], values: Sequence[Tensor | int], needs: Sequence[bool]) -> list[Tensor]:
    """The result on copies of ``values``, and the gradients that a weighted sum of it has for those that need one."""
    copies = [_copied(value, need) for value, need in zip(values, needs, strict=True)]
    leaves = [copy for copy, need in zip(copies, needs, strict=True) if need and isinstance(copy, Tensor)]
    with torch.set_grad_enabled(bool(leaves)):
        # in-place steps of the source may write into its inputs, which autograd forbids for leaves
        out = run(*(copy * 1 if isinstance(copy, Tensor) and copy.requires_grad else copy for copy in copies))
    if not leaves:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights, materialize_grads=True)]


def _copied(value: Tensor | int, need: bool) -> Tensor | int:
    return value.clone().requires_grad_(need) if isinstance(value, Tensor) else value
