"""Algebra to spec: one site in canonical form."""

from __future__ import annotations

from attnfuse.errors import BadProgram, Refused
from attnfuse.graph import facts
from attnfuse.passes.simplify.rename import Renamer
from attnfuse.passes.simplify.roles import Axes, Roles, roles_of
from attnfuse.passes.site import Attention, Layout, Leaf, Site
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["simplify"]


def simplify(site: Site) -> Attention | Refused:
    """The site as a spec and the layouts of its operands."""
    roles = roles_of(site)
    dimensions = roles.named()
    renamer = Renamer(site, dimensions)
    score, weight, *extra = map(renamer.program, site.programs())
    if len(extra) > 1:
        return _refusal(site, f"{len(extra)} columns beside the keys are normalised with them")
    captures = tuple(_captured(leaf, dimensions) for leaf in renamer.leaves)
    try:
        spec = AttentionSpec(
            score=score,
            weight=weight,
            sink=extra[0] if extra else None,
            dropout=site.dropout,
            captures=captures,
            batch=len(roles.batch),
            symbols=len(renamer.symbols),
            normaliser=site.normaliser,
            empty_rows=site.empty_rows,
            exact_scores=site.exact_scores,
        )
    except BadProgram as error:
        return _refusal(site, str(error))
    query, key, value = _operands(site, roles)
    return Attention(
        site=site,
        spec=spec,
        query=query,
        key=key,
        value=value,
        captures=tuple(_capture_layout(leaf, tuple(dimensions.values())) for leaf in renamer.leaves),
        symbols=tuple(renamer.symbols),
        groups=(*_singles(roles.batch), roles.head, roles.row, roles.outer),
    )


def _refusal(site: Site, reason: str) -> Refused:
    return Refused(reason, site.softmax.name, facts.source_line(site.softmax))


def _captured(leaf: Leaf, dimensions: dict[str, Axes]) -> Captured:
    present = {axis for index in leaf.place for axis in index.axes}
    axes = tuple(name for name, dimension in dimensions.items() if present & set(dimension))
    return Captured(axes, str(facts.dtype(leaf.node)).removeprefix("torch."))


def _capture_layout(leaf: Leaf, groups: tuple[Axes, ...]) -> Layout:
    return Layout((leaf,), groups, (False,) * len(groups), facts.dtype(leaf.node))


def _operands(site: Site, roles: Roles) -> tuple[Layout, Layout, Layout]:
    """Key and value may lack batch axes; every other axis is expanded where the tensor lacks it.

    A product that is computed in another dtype than its operands have is autocast's: the cast is made explicit.
    """
    batch = _singles(roles.batch)
    inner, outer = roles.inner, roles.outer
    lead = tuple(False for _ in batch)
    summed = facts.dtype(site.node)
    # a call may have several results
    scored = facts.dtype(site.product) if facts.is_tensor(site.product) else summed
    return (
        Layout(site.query.views, (*batch, roles.head, roles.row, inner), (*map(bool, batch), True, True, True), scored),
        Layout(site.key.views, (*batch, roles.kv_head, roles.key, inner), (*lead, True, True, True), scored),
        Layout(site.value.views, (*batch, roles.kv_head, roles.key, outer), (*lead, True, True, True), summed),
    )


def _singles(axes: Axes) -> tuple[Axes, ...]:
    return tuple((axis,) for axis in axes)
