"""What the stages hand on: lift finds a :class:`Site`, simplify makes an :class:`Attention` of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attnfuse.axes import Axis, Index, Minor, Size
from attnfuse.graph import facts
from attnfuse.kernels import Source
from attnfuse.reference import is_float8
from attnfuse.score import Capture, Expr, walk
from attnfuse.spec import AttentionSpec, EmptyRows, Normaliser

__all__ = ["UNWANTED", "Attention", "Demand", "Layout", "Leaf", "Operand", "Place", "Site"]

#: What makes an attention fuse whose weights are wanted.
UNWANTED = "do not ask for attention weights (output_attentions=False)"

#: Where in a tensor: one index for each of its dimensions.
Place = tuple[Index, ...]


@dataclass(frozen=True)
class Leaf:
    """An element of a tensor that is taken as it is."""

    node: Node
    place: Place


@dataclass(frozen=True)
class Operand:
    """A tensor of a contraction: ``factor`` times any of ``views``, which all name the same element.

    ``views`` begin with the contraction's own operand and end with the tensor that the views are of.
    """

    factor: Expr
    views: tuple[Leaf, ...]

    @property
    def source(self) -> Leaf:
        """The tensor that all the views are of."""
        return self.views[-1]


@dataclass(frozen=True)
class Site:
    """``out[place] = sum over keys of weight(softmax(score(query . key))) * value``, as lift read it.

    ``node`` is the second contraction, ``product`` the first, ``softmax`` the normaliser. The programs read
    ``s`` or ``p``, tensors ``t<slot>`` that ``leaves`` explains, indices that ``variables`` explains, and
    sizes ``z<slot>`` of ``symbols``. Places are in axes that are split no further. ``reads`` are all nodes that
    were interpreted, with where, and ``consumers`` the first node that reads each; ``interior`` are those from
    the first contraction up to the second. ``source`` says how the graph computes it. Where that is one call,
    ``product`` and ``softmax`` are that call. A site of float8 tensors is ``widened`` where they are read as what the
    products are of, which the graph makes of them.

    ``weights`` are the nodes that hold the normalised weights as they are, with where, in graph order. A site without a
    value gives these weights: ``node`` is one of them, which others want as ``wanted`` says, and what is done with it,
    the second contraction included, stays in the graph.
    """

    node: Node
    product: Node
    softmax: Node
    place: Place
    weight_place: Place
    keys: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    query: Operand
    key: Operand
    value: Operand | None
    score: Expr
    weight: Expr
    extra: tuple[Expr, ...]
    dropout: float
    leaves: Mapping[int, Leaf]
    variables: Mapping[str, tuple[Axis, ...]]
    symbols: tuple[Size, ...]
    reads: Mapping[Node, Place]
    consumers: Mapping[Node, Node]
    normaliser: Normaliser = "softmax"
    empty_rows: EmptyRows = "nan"
    source: Source = "written"
    exact_scores: bool = False
    weight_dtype: str | None = None
    interior: frozenset[Node] = frozenset()
    widened: Site | None = None
    weights: tuple[Leaf, ...] = ()
    wanted: str = ""

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Query, key and, where there is one, value."""
        return (self.query, self.key, *(() if self.value is None else (self.value,)))

    @property
    def is_narrow(self) -> bool:
        """Whether an operand is a float8 tensor."""
        return any(is_float8(facts.dtype(each.source.node)) for each in self.operands)

    def programs(self) -> tuple[Expr, ...]:
        """Score, weight and the extra logits."""
        return (self.score, self.weight, *self.extra)

    def read(self) -> Iterator[Leaf]:
        """Every tensor that the fused node will read."""
        yield from (operand.source for operand in self.operands)
        for program in self.programs():
            yield from (self.leaves[part.slot] for part in walk(program) if isinstance(part, Capture))


@dataclass(frozen=True)
class Layout:
    """How a tensor becomes an operand: any of ``views``, its axes brought into ``groups``, one to a dimension.

    A group none of whose axes the tensor has becomes a dimension of size 1, or is expanded where
    ``expand`` says so; the tensor is cast to ``dtype``.
    """

    views: tuple[Leaf, ...]
    groups: tuple[tuple[Axis, ...], ...]
    expand: tuple[bool, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Attention:
    """One site in canonical form: what it computes and where its operands are. Shapes as in :mod:`attnfuse.spec`.

    Without a value its result is the weights. ``groups`` are the dimensions of the fused node's result, in the axes of
    ``site.place``, which are those of ``site.node``. ``widened`` is that of the site's. Where it is ``quantised`` the
    operands are rounded as weights are, and their three scales are captures behind those that have layouts.
    """

    site: Site
    spec: AttentionSpec
    query: Layout
    key: Layout
    value: Layout | None
    captures: tuple[Layout, ...]
    symbols: tuple[Size, ...]
    groups: tuple[tuple[Axis, ...], ...]
    widened: Attention | None = None
    quantised: bool = False

    def resized(self, sizes: Mapping[Axis, int]) -> Attention:
        """The same attention with other sizes of some axes; its operands' layouts are to be built anew."""

        def axes(group: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(Axis(axis.name, sizes.get(axis, axis.size)) for axis in group)

        def place(old: Place) -> Place:
            return tuple(Index(axes(index.axes), index.offset) for index in old)

        def layout(old: Layout) -> Layout:
            views = tuple(Leaf(leaf.node, place(leaf.place)) for leaf in old.views)
            return replace(old, views=views, groups=tuple(map(axes, old.groups)))

        return replace(
            self,
            site=replace(self.site, place=place(self.site.place)),
            query=layout(self.query),
            key=layout(self.key),
            value=None if self.value is None else layout(self.value),
            captures=tuple(map(layout, self.captures)),
            groups=tuple(map(axes, self.groups)),
        )

    @property
    def operands(self) -> tuple[Layout, ...]:
        """Query, key and, where there is one, value."""
        return (self.query, self.key, *(() if self.value is None else (self.value,)))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The operands and the captures, in slot order."""
        return (*self.operands, *self.captures)


@dataclass(frozen=True, eq=False)
class Demand:
    """A tensor that a fused node will read, and the seconds of its kernel with the tensor in each layout.

    ``columns`` is the dimension that is contiguous when it is d-minor, ``rows`` the one when it is n-minor;
    ``operands`` say what the node reads it as, query, key or value, and ``today`` how it lies.
    """

    site: Site
    operands: tuple[str, ...]
    node: Node
    columns: int
    rows: int
    today: Minor
    d: float
    n: float

    @property
    def is_better_turned(self) -> bool:
        """Whether the kernel would be faster with the other layout."""
        return self.d > self.n if self.today == "d" else self.n > self.d
