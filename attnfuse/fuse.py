"""``fuse_graph``: the rewrite of one graph, and the only place where capture, passes and lowering meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from attnfuse.errors import NotEquivalent, Refused
from attnfuse.graph import facts
from attnfuse.graph.capture import Captured, capture
from attnfuse.graph.flex import flex_programs
from attnfuse.graph.state import State as GraphState
from attnfuse.graph.text import render
from attnfuse.graph.verify import verify
from attnfuse.layouts import Reads, copies_for, place, rearrange, refreshed
from attnfuse.options import Options
from attnfuse.passes.certify import Replay, certify
from attnfuse.passes.lift import Constants, Given, lift
from attnfuse.passes.lower import Plan, Wishes, apply, at_sizes, plan
from attnfuse.passes.place import Decision, described
from attnfuse.passes.simplify import simplify
from attnfuse.passes.site import Attention, Site
from attnfuse.passes.tidy import tidy
from attnfuse.pipeline import FUEL, Stage, run
from attnfuse.report import Certificate, Fused, Report
from attnfuse.target import Target

__all__ = ["STAGES", "fuse_graph"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A plan that was found to compute what its source computes."""

    plan: Plan
    certificate: Certificate


#: A place in the graph, as far as the pipeline has brought it.
Item = Site | Attention | Plan | Checked | Fused | Refused


@dataclass(frozen=True)
class State:
    """What the stages work on.

    ``decisions`` are about the layouts of operands, ``undecided`` says why there are none; ``replaced`` are the sites
    that lower has put a fused node for.
    """

    captured: Captured
    options: Options
    wishes: Wishes
    items: tuple[Item, ...] = ()
    decisions: tuple[Decision, ...] = ()
    undecided: str = ""
    replaced: tuple[Site, ...] = ()
    certificates: dict[str, Certificate] = field(default_factory=dict)


def fuse_graph(
    gm: GraphModule, example_inputs: Sequence[Any] = (), *, state: GraphState | None = None, **options: Any
) -> GraphModule:
    """Fuses the attention in a Dynamo-level or export-level graph, in place, and returns it.

    ``options`` are the fields of :class:`Options`. ``gm.meta["attnfuse_report"]`` is the :class:`Report`. Nested
    graph modules (checkpointed regions, branches) are rewritten too. ``example_inputs`` are not read: the
    graph's own fake values are; the argument is there so that this is a Dynamo backend's shape. ``state`` is what is
    known of the graph's placeholders.
    Raises :class:`BadInput` for an unknown option, kernel or target.
    """
    chosen = Options.of(options)
    report = Report(target=str(_target(gm, chosen)))
    for module in (*_nested(gm), gm):
        report += _fuse_one(module, chosen, state if module is gm else None)
    gm.meta["attnfuse_report"] = report
    log.info("%s", report)
    return gm


def _nested(gm: GraphModule) -> list[GraphModule]:
    programs = flex_programs(gm)
    return [child for child in gm.modules() if isinstance(child, GraphModule) and child not in (gm, *programs)]


def _fuse_one(gm: GraphModule, options: Options, known: GraphState | None) -> Report:
    target = _target(gm, options)
    try:
        captured = capture(gm, known)
    except Exception as error:  # whatever the program raises: the graph stays as it is, and the report says so
        log.debug("tracing failed", exc_info=True)
        reason = f"the graph cannot be traced: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Report((Refused(reason),), str(target))
    wishes = Wishes(
        target=target,
        kernel=options.kernel,
        numerics=options.numerics,
        portable=options.portable,
        profit=options.profit,
        compiled=options.compiled,
        fp8_attention=options.fp8_attention,
    )
    state = State(captured, options, wishes)
    state, seconds = run(STAGES, state, show=_show, check=_check, print_after=options.print_after)
    if state.replaced:
        gm.recompile()
    sites = tuple(item for item in state.items if isinstance(item, (Fused, Refused)))
    return Report(sites, str(target), seconds, tuple(map(described, state.decisions)))


def _target(gm: GraphModule, options: Options) -> Target:
    """The target asked for, or the device that the graph's first tensor is on."""
    if isinstance(options.target, Target):
        return options.target
    first = next((facts.tensor(node) for node in gm.graph.nodes if facts.is_tensor(node)), None)
    return Target.current() if first is None else Target.of(first.device)


# --- stages -----------------------------------------------------------------------------------------


def _lift(state: State) -> State:
    captured = state.captured
    constants = Constants(captured.constant)
    found = lift(captured.aten, Given(captured.is_given, captured.is_parameter, constants, captured.differentiated))
    return replace(state, items=tuple(_homed(item, captured) for item in found))


def _homed(item: Site | Refused, captured: Captured) -> Site | Refused:
    if isinstance(item, Refused) or captured.is_given(item.node):
        return item
    line = facts.source_line(item.softmax)
    return Refused("the attention is inside a call that the graph keeps closed", item.softmax.name, line)


def _simplify(state: State) -> State:
    return replace(state, items=tuple(simplify(i) if isinstance(i, Site) else i for i in state.items))


def _choose(state: State) -> State:
    return replace(state, items=tuple(_planned(i, state) if isinstance(i, Attention) else i for i in state.items))


def _planned(item: Attention, state: State) -> Plan | Refused:
    try:
        return plan(item, state.captured, state.wishes)
    except Exception as error:  # nothing was changed yet, and a bug of ours must not stop the compilation of a model
        log.exception("planning %s failed", item.site.node.name)
        return _bug("planning", error, item.site.softmax)


def _bug(doing: str, error: Exception, node: Node) -> Refused:
    reason = f"{doing} it failed with {type(error).__name__}: {error}, which is a bug of attnfuse"
    return Refused(reason, node.name, facts.source_line(node), "please report it")


def _place(state: State) -> State:
    plans = [item for item in state.items if isinstance(item, Plan)]
    placed = place(plans, state.captured, state.wishes)
    fitting = dict(zip(map(id, plans), placed.plans, strict=True))
    items = tuple(fitting.get(id(item), item) for item in state.items)
    return replace(state, items=items, decisions=placed.decisions, undecided=placed.reason)


def _certify(state: State) -> State:
    return replace(state, items=tuple(_checked(i, state) if isinstance(i, Plan) else i for i in state.items))


def _checked(item: Plan, state: State) -> Checked | Refused:
    site = item.attention.site
    try:
        certificate = certify(_replay(item, state), state.options.certify, state.certificates)
    except Refused as refusal:
        return replace(refusal, node=site.softmax.name, source=facts.source_line(site.softmax))
    except NotEquivalent as error:
        reason = f"the rewrite is not equivalent, which is a bug of attnfuse: {error}"
        return Refused(reason, site.softmax.name, facts.source_line(site.softmax), "please report it")
    except Exception as error:  # as in _planned
        log.exception("replaying %s failed", site.node.name)
        return _bug("replaying", error, site.softmax)
    return Checked(item, certificate)


def _replay(item: Plan, state: State) -> Replay:
    placeholders = (node for node in item.replacement.graph.nodes if node.op == "placeholder")
    needs = tuple(facts.is_tensor(node) and facts.tensor(node).requires_grad for node in placeholders)
    smaller = partial(at_sizes, item, wishes=state.wishes)
    return Replay(
        item.attention,
        item.inputs,
        needs,
        item.replacement,
        smaller,
        item.problem.scores,
        state.captured.constant,
        faithful=item.problem.numerics == "faithful",
    )


def _lower(state: State) -> State:
    fuelled = tuple(_fuelled(item) if isinstance(item, Checked) else item for item in state.items)
    sites = [item.plan.attention.site for item in fuelled if isinstance(item, Checked)]
    reads = rearrange(state.decisions, [site.node for site in sites], state.captured)
    done = tuple(_lowered(item, state, reads) if isinstance(item, Checked) else item for item in fuelled)
    return replace(state, items=done, replaced=tuple(sites))


def _fuelled(item: Checked) -> Checked | Refused:
    node = item.plan.attention.site.softmax
    line, remedy = facts.source_line(node), f"raise {FUEL.variable}"
    return item if FUEL.take() else Refused("no optimisation fuel is left", node.name, line, remedy)


def _lowered(item: Checked, state: State, reads: Reads) -> Fused:
    site = item.plan.attention.site
    apply(item.plan, state.captured, reads[site.node])
    spec, problem = item.plan.attention.spec, item.plan.problem
    return Fused(
        node=site.node.name,
        source=facts.source_line(site.softmax),
        spec=spec.to_text(),
        what=problem.words,
        shape=problem.shapes,
        kernel=item.plan.choice.kernel,
        seconds=item.plan.choice.seconds,
        certificate=item.certificate,
        notes=(*_notes(item.plan, state.undecided), *_accuracy(item)),
        layouts=dict(problem.minors),
        copies=copies_for(site.node, state.decisions),
    )


def _notes(item: Plan, undecided: str) -> tuple[str, ...]:
    notes = [undecided] if undecided else []
    wanted = item.attention.site.wanted
    notes += [f"{wanted}: they are written once, the scores never"] if wanted else []
    notes += ["dropout draws from another random stream than the source"] if item.attention.spec.dropout else []
    fast = "fast numerics: fully masked rows may differ from the source"
    return (*notes, fast) if item.problem.numerics == "fast" else tuple(notes)


def _accuracy(item: Checked) -> tuple[str, ...]:
    """What rounding to float8 on request costs."""
    if not item.plan.attention.quantised:
        return ()
    found = item.certificate
    errors = f"mean error {found.fused_mean:.2g} against float64, where the source has {found.source_mean:.2g}"
    return (f"quantised to float8 as asked for: {found.skipped or errors}",)


def _tidy(state: State) -> State:
    writes = frozenset(node for site in state.replaced for node in site.interior if facts.is_mutating(node))
    tidy(state.captured, [site.node for site in state.replaced], writes)
    refreshed(state.decisions, state.captured)
    return state


#: The rewrite, in order. Only lower and tidy change the graph.
STAGES: tuple[Stage[State], ...] = (
    Stage("lift", _lift),
    Stage("simplify", _simplify),
    Stage("choose", _choose),
    Stage("place", _place),
    Stage("certify", _certify),
    Stage("lower", _lower),
    Stage("tidy", _tidy),
)


def _check(state: State, stage: str) -> None:
    verify(state.captured.module, stage)


def _show(state: State) -> str:
    return "\n".join([*map(_item_text, state.items), render(state.captured.module)])


def _item_text(item: Item) -> str:
    match item:
        case Site():
            return f"{item.node.name}: {item.score}"
        case Attention():
            return f"{item.site.node.name}: {item.spec.to_text()}"
        case Plan():
            return f"{item.attention.site.node.name}: {item.choice.kernel}\n{render(item.replacement)}"
        case Checked():
            return f"{item.plan.attention.site.node.name}: {item.certificate}"
    return str(item)
