"""Which axis is batch, head, query row, key or feature: read off from who has it, never from its position's name."""

from __future__ import annotations

from dataclasses import dataclass

from attnfuse.axes import Axis
from attnfuse.passes.site import Leaf, Site

__all__ = ["Axes", "Roles", "roles_of"]

#: Some axes that make up one dimension, most significant first.
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Roles:
    """Every axis of a site by its role. ``group`` are the query heads that share one ``kv_head``."""

    batch: Axes
    kv_head: Axes
    group: Axes
    row: Axes
    key: Axes
    inner: Axes
    outer: Axes

    @property
    def head(self) -> Axes:
        """The query heads, in the order that lets head ``h`` read key/value head ``h // len(group)``."""
        return (*self.kv_head, *self.group)

    def named(self) -> dict[str, Axes]:
        """The score's dimensions by the names that programs use."""
        batch = {f"b{i}": (axis,) for i, axis in enumerate(self.batch)}
        return {**batch, "h": self.head, "m": self.row, "n": self.key}


def roles_of(site: Site) -> Roles:
    """An axis that key or value has is batch or head; of the others the last dimension is the query row, and the
    rest are heads that share a key/value head.
    """
    keyed = set.union(*(_axes(operand.source) for operand in site.operands[1:]))
    dimensions = [index.axes for index in site.weight_place]
    row = _row(dimensions, dimensions.index(site.keys), keyed)
    dimensions.remove(site.keys)
    flat = [axis for axes in dimensions for axis in axes]
    shared = [axis for axis in flat if axis in keyed]
    group = tuple(axis for axis in flat if axis not in keyed and axis not in row)
    kv_head = _kv_head(dimensions, shared, group)
    outside = [axis for index in site.place for axis in index.axes]
    return Roles(
        batch=tuple(axis for axis in shared if axis not in kv_head),
        kv_head=kv_head,
        group=group,
        row=row,
        key=site.keys,
        inner=site.inner,
        outer=tuple(axis for axis in outside if axis not in flat),
    )


def _axes(leaf: Leaf) -> set[Axis]:
    return {axis for index in leaf.place for axis in index.axes}


def _row(dimensions: list[Axes], key: int, keyed: set[Axis]) -> Axes:
    """The free axes of the dimension beside the keys: after them where the weights stand transposed, else before.

    One of size 1 before them is a single query row. Where heads stand beside the keys it is the last
    dimension that has free axes.
    """
    before = dimensions[key - 1] if key else ()
    beside = [axes for axes in (*dimensions[key + 1 : key + 2], before) if _free(axes, keyed)]
    if beside:
        return _free(beside[0], keyed)
    if key and not before:
        return ()
    others = [_free(axes, keyed) for axes in dimensions[:key] + dimensions[key + 1 :]]
    return next((axes for axes in reversed(others) if axes), ())


def _free(axes: Axes, keyed: set[Axis]) -> Axes:
    return tuple(axis for axis in axes if axis not in keyed)


def _kv_head(dimensions: list[Axes], shared: list[Axis], group: Axes) -> Axes:
    """The shared axis that the group's heads lie in, or else the last one; a lone one is the batch of multi-query
    attention when there is a group beside it.
    """
    for axes in dimensions:
        here = [axis for axis in axes if axis in shared]
        if here and any(axis in group for axis in axes):
            return (here[-1],)
    if len(shared) >= 2 or (shared and not group):
        return (shared[-1],)
    return ()
