"""Which kernel computes a site best, or that none of them beats the graph as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnfuse.axes import Axis, Minor, product, same_size
from attnfuse.errors import NoKernel, Refused
from attnfuse.graph import facts
from attnfuse.graph.build import UnknownSize
from attnfuse.graph.capture import Captured
from attnfuse.kernels import UNFUSED, Choice, Numerics, Operand, Problem, Source, choose, lookup, rows_kept
from attnfuse.kernels.prices import prices_of
from attnfuse.passes.lower.operands import Operands
from attnfuse.passes.lower.quantise import quantised
from attnfuse.passes.lower.replacement import Draft, draft, finished
from attnfuse.passes.site import UNWANTED, Attention
from attnfuse.reference import is_float8
from attnfuse.target import Target

__all__ = ["Plan", "Wishes", "at_sizes", "plan", "relaid"]

#: More rows than any program has, for proofs that must hold for every number of rows.
_MANY = 2**40


#: What a kernel competes with, in words.
_AS_IT_IS: dict[Source, str] = {
    "written": "the graph as it is",
    **dict.fromkeys(("sdpa", "sdpa causal", "sdpa masked"), "the call of scaled_dot_product_attention that is there"),
    "flex": "the call of flex_attention that is there",
}


@dataclass(frozen=True)
class Wishes:
    """What the caller wants of a kernel.

    ``profit`` False fuses even where the unfused graph is estimated faster; ``compiled`` says that the
    rewritten graph will be compiled, and so would the unfused one; ``fp8_attention`` that operands may be rounded to
    float8 where that is estimated faster.
    """

    target: Target
    kernel: str | None = None
    numerics: Numerics = "faithful"
    portable: bool = False
    profit: bool = True
    compiled: bool = True
    fp8_attention: bool = False


@dataclass(frozen=True)
class Plan:
    """A site, the kernel chosen for it, and the graph that will replace it, whose placeholders are ``inputs``."""

    attention: Attention
    choice: Choice
    problem: Problem
    inputs: tuple[Node, ...]
    replacement: GraphModule


def plan(attention: Attention, captured: Captured, wishes: Wishes) -> Plan | Refused:
    """The best plan for a site; refused where no kernel can, or none is estimated to pay."""
    found = _plan(attention, captured, wishes)
    if attention.widened is not None:
        wide = _plan(attention.widened, captured, wishes)
        return _fastest([(found, 0.0), (wide, _widening(attention, wide, wishes))], wishes)
    narrow = quantised(attention, wishes.target) if wishes.fp8_attention and isinstance(found, Plan) else None
    if narrow is None:
        return found
    # it competes with the fusion that pays, not with a graph that nobody wrote
    rounded = _plan(narrow, captured, replace(wishes, profit=False))
    return _fastest([(found, 0.0), (rounded, _quantising(rounded, wishes))], wishes)


def _fastest(found: Sequence[tuple[Plan | Refused, float]], wishes: Wishes) -> Plan | Refused:
    """Of several plans for one site, each with the seconds that making its operands takes; the first refusal where
    there is none.
    """
    # a float8 has no gradient worth having
    able = [
        (_attainable(plan.problem, plan.choice, wishes) + before, place, plan)
        for place, (plan, before) in enumerate(found)
        if isinstance(plan, Plan) and not (plan.problem.training and plan.attention.spec.out_dtype)
    ]
    return min(able)[2] if able else found[0][0]


def _quantising(plan: Plan | Refused, wishes: Wishes) -> float:
    """Seconds of rounding a plan's operands to float8: they are read for their largest element, and once more."""
    return sum(2 * _pass(operand, wishes) for operand in _operands(plan))


def _widening(narrow: Attention, plan: Plan | Refused, wishes: Wishes) -> float:
    """Seconds of making the operands of a plan that are float8 in the ``narrow`` attention."""
    widened = (is_float8(layout.dtype) for layout in narrow.operands)
    # of each element one byte is read and two are written
    return sum(0.75 * _pass(operand, wishes) for operand in compress(_operands(plan), widened))


def _operands(plan: Plan | Refused) -> tuple[Operand, ...]:
    return (plan.problem.query, plan.problem.key, plan.problem.value) if isinstance(plan, Plan) else ()


def _pass(operand: Operand, wishes: Wishes) -> float:
    """Seconds of reading and writing an operand of a half type."""
    return prices_of(wishes.target).pass_seconds(math.prod(operand.shape), torch.bfloat16)


def _plan(attention: Attention, captured: Captured, wishes: Wishes) -> Plan | Refused:
    if wishes.portable and attention.value is None:
        # rows computed apart by ATen would have to be copied together again; whether that pays was not measured
        return _refusal(attention, "only an operator of attnfuse's own gives them", "keep it with --custom-op")
    try:
        start = draft(attention, captured.value)
        problem = replace(_problem(attention, start.operands, wishes), autocast=captured.casts)
        choice = choose(problem, wishes.target, wishes.kernel, portable=wishes.portable)
    except (UnknownSize, NoKernel) as error:
        return _refusal(attention, str(error))
    ours, theirs = _attainable(problem, choice, wishes), choice.seconds[UNFUSED]
    if wishes.profit and ours > choice.limit:
        what = _AS_IT_IS[problem.source]
        reason = f"no kernel is faster: {choice.kernel} is estimated at {ours:.2g} s, {what} at {theirs:.2g} s"
        return _refusal(attention, reason, "profit=False fuses all the same")
    return _planned(attention, start, problem, choice, wishes)


def _attainable(problem: Problem, choice: Choice, wishes: Wishes) -> float:
    """Seconds of a problem, its value copied where that pays: float8 may be multiplied twice as fast transposed."""
    straight = choice.seconds[choice.kernel]
    if not is_float8(problem.value.dtype):
        return straight
    minor: Minor = "d" if problem.value.minor == "n" else "n"
    turned = replace(problem, value=replace(problem.value, minor=minor))
    copy = prices_of(wishes.target).copy_seconds(math.prod(problem.value.shape), problem.value.dtype)
    try:
        return min(straight, choose(turned, wishes.target, choice.kernel).seconds[choice.kernel] + copy)
    except NoKernel:
        return straight


def relaid(chosen: Plan, minors: Mapping[str, Minor], orders: Mapping[Node, Sequence[int]], wishes: Wishes) -> Plan:
    """The plan with operands in other layouts, and the kernel that is fastest then.

    ``minors`` are the layouts of query, key and value, where they differ from the plan's, and ``orders`` those of the
    inputs: the order of their dimensions in memory. Raises :class:`NoKernel` when none can compute it so.
    """
    operands = {name: replace(getattr(chosen.problem, name), minor=minor) for name, minor in minors.items()}
    problem = replace(chosen.problem, **operands)
    choice = choose(problem, wishes.target, wishes.kernel, portable=wishes.portable)
    if choice.kernel == chosen.choice.kernel and not (wishes.portable or lookup(choice.kernel).inlines(problem)):
        # its node is the same in all layouts
        return replace(chosen, choice=choice, problem=problem)
    standing = dict(zip(chosen.inputs, map(facts.value, _placeholders(chosen.replacement)), strict=True))

    def value(node: Node) -> object:
        return _lying(standing[node], orders[node]) if node in orders else standing[node]

    return _planned(chosen.attention, draft(chosen.attention, value), problem, choice, wishes)


def _lying(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A dense tensor like another, its dimensions in that order in memory, outermost first."""
    made = tensor.new_empty([tensor.shape[dim] for dim in order])
    turned = made.permute([order.index(dim) for dim in range(len(order))])
    return turned.requires_grad_() if tensor.requires_grad else turned


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _planned(attention: Attention, start: Draft, problem: Problem, choice: Choice, wishes: Wishes) -> Plan:
    kernel = lookup(choice.kernel)
    module = finished(attention, start, kernel, problem, wishes.portable)
    return Plan(attention, choice, problem, start.inputs, module)


def at_sizes(chosen: Plan, sizes: Mapping[Axis, int], wishes: Wishes) -> GraphModule:
    """The plan's replacement for the same site with other sizes of some axes."""
    attention = chosen.attention.resized(sizes)
    leaves = {leaf.node: leaf for layout in attention.layouts for leaf in layout.views}

    def value(node: Node) -> Tensor:
        traced = facts.tensor(node)
        wanted = (product(axis.size for axis in index.axes) for index in leaves[node].place)
        # a symbolic dimension keeps its symbol
        shape = [size if isinstance(size, int) else old for size, old in zip(wanted, traced.shape, strict=True)]
        return traced.new_empty(shape)

    kernel = lookup(chosen.choice.kernel)
    return finished(attention, draft(attention, value), kernel, chosen.problem, wishes.portable)


def _refusal(attention: Attention, reason: str, remedy: str = "") -> Refused:
    node, wanted = attention.site.softmax, attention.site.wanted
    reason = f"{wanted}, and {reason}" if wanted else reason
    remedy = "; or ".join(filter(None, (remedy, UNWANTED if wanted else "")))
    return Refused(reason, node.name, facts.source_line(node), remedy)


def _problem(attention: Attention, operands: Operands, wishes: Wishes) -> Problem:
    """The site as the kernels are asked about it, with symbolic sizes at their hints."""
    query, key, values = operands.query, operands.key, operands.values
    sizes = [size for node in (query, key, *values) for size in facts.shape(node)]
    return Problem(
        spec=attention.spec,
        query=_operand(query),
        key=_operand(key),
        value=_operand(values[0]) if values else _operand(key).without_columns(),
        captures=tuple(map(_operand, operands.captures)),
        dynamic=not all(isinstance(size, int) for size in sizes),
        rows_kept=_rows_kept(attention, query, key),
        numerics=wishes.numerics,
        symbols=tuple(facts.hint_of(s) if isinstance(s, Node) else s for s in operands.symbols),
        compiled=wishes.compiled,
        source=attention.site.source,
        weights=not values,
    )


def _rows_kept(attention: Attention, query: Node, key: Node) -> bool:
    """Whether every row keeps a key, whatever values the symbolic sizes take.

    More keys never hurt, so one key and very many rows prove it for all; with as many rows as keys, one
    of each does, since a band of constant offsets then holds the whole diagonal.
    """
    rows, keys = facts.shape(query)[-2], facts.shape(key)[-2]
    if isinstance(rows, int) and isinstance(keys, int):
        return rows_kept(attention.spec, rows, keys)
    if same_size(rows, keys):
        return rows_kept(attention.spec, 1, 1)
    return rows_kept(attention.spec, _MANY, 1)


def _operand(node: Node) -> Operand:
    columns, rows = (
        facts.hint_of_size(facts.tensor(node).stride(dim)) if facts.rank(node) > 1 else 1 for dim in (-1, -2)
    )
    minor: Minor = "n" if rows == 1 and columns != 1 else "d"
    return Operand(facts.hint(node), facts.dtype(node), facts.tensor(node).requires_grad, minor)
