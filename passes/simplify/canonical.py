"""Algebra to spec: one site in canonical form."""

from __future__ import annotations

import torch

from attnfuse.errors import BadProgram, Refused
from attnfuse.graph import facts
from attnfuse.passes.simplify.rename import Renamer
from attnfuse.passes.simplify.roles import Axes, Roles, roles_of
from attnfuse.passes.site import Attention, Layout, Leaf, Operand, Site
from attnfuse.reference import is_float8, name_of
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
            weight_dtype=site.weight_dtype,
            out_dtype=_out_dtype(site),
        )
    except BadProgram as error:
        return _refusal(site, str(error))
    query, key, *values = _operands(site, roles)
    widened = None if site.widened is None else simplify(site.widened)
    return Attention(
        site=site,
        spec=spec,
        query=query,
        key=key,
        value=values[0] if values else None,
        captures=tuple(_capture_layout(leaf, tuple(dimensions.values())) for leaf in renamer.leaves),
        symbols=tuple(renamer.symbols),
        groups=(*_singles(roles.batch), roles.head, roles.row, roles.outer if values else roles.key),
        widened=widened if isinstance(widened, Attention) else None,
    )


def _out_dtype(site: Site) -> str | None:
    """The result's type where it is not value's: weights, and the result of values that are float8 tensors."""
    named = site.value is None or is_float8(facts.dtype(site.value.source.node))
    return name_of(facts.dtype(site.node)) if named else None


def _refusal(site: Site, reason: str) -> Refused:
    return Refused(reason, site.softmax.name, facts.source_line(site.softmax))


def _captured(leaf: Leaf, dimensions: dict[str, Axes]) -> Captured:
    present = {axis for index in leaf.place for axis in index.axes}
    axes = tuple(name for name, dimension in dimensions.items() if present & set(dimension))
    return Captured(axes, name_of(facts.dtype(leaf.node)))


def _capture_layout(leaf: Leaf, groups: tuple[Axes, ...]) -> Layout:
    return Layout((leaf,), groups, (False,) * len(groups), facts.dtype(leaf.node))


def _operands(site: Site, roles: Roles) -> tuple[Layout, ...]:
    """Query, key and, where there is one, value.

    Key and value may lack batch axes; every other axis is expanded where the tensor lacks it. A product that is
    computed in another dtype than its operands have is autocast's: the cast is made explicit. What was dequantised for
    it is left as it was before.
    """
    batch = _singles(roles.batch)
    inner, outer = roles.inner, roles.outer
    lead = tuple(False for _ in batch)
    summed = facts.dtype(site.node)
    # a call may have several results
    scored = facts.dtype(site.product) if facts.is_tensor(site.product) else summed
    every = (True, True, True)
    query = _layout(site.query, (*batch, roles.head, roles.row, inner), (*map(bool, batch), *every), scored)
    key = _layout(site.key, (*batch, roles.kv_head, roles.key, inner), (*lead, *every), scored)
    if site.value is None:
        return query, key
    return query, key, _layout(site.value, (*batch, roles.kv_head, roles.key, outer), (*lead, *every), summed)


def _layout(operand: Operand, groups: tuple[Axes, ...], expand: tuple[bool, ...], dtype: torch.dtype) -> Layout:
    own = facts.dtype(operand.source.node)
    return Layout(operand.views, groups, expand, own if is_float8(own) else dtype)


def _singles(axes: Axes) -> tuple[Axes, ...]:
    return tuple((axis,) for axis in axes)
