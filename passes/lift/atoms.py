"""What a read expression is made of where it stops being pointwise.

In an expression that :class:`~attnfuse.passes.lift.reader.Reader` returns, ``t<slot>`` stands for the atom in that
slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from attnfuse.axes import Axis, Index
from attnfuse.passes.site import Leaf, Place
from attnfuse.score import Expr
from attnfuse.spec import EmptyRows

__all__ = ["Atom", "Dot", "Dropped", "Leaf", "Place", "Reduced", "Softmax"]


@dataclass(frozen=True)
class Dot:
    """A contraction: the sum over ``axes`` of left times right."""

    node: Node
    place: Place
    left: Node
    left_place: Place
    right: Node
    right_place: Place
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Softmax:
    """One weight of a softmax: ``logit`` read at ``key``, over all keys and the logits in ``extra``.

    ``extra`` are the columns of the normalised dimension beyond those that ``key`` runs over; ``empty_rows`` is as in
    :mod:`attnfuse.spec`.
    """

    node: Node
    key: Index
    logit: Expr
    extra: tuple[Expr, ...]
    empty_rows: EmptyRows = "nan"


@dataclass(frozen=True)
class Reduced:
    """``kind`` ("max", "sum", "logsumexp" or "any") of ``operand`` over dimension ``dim``; ``place`` has a 0 there.

    ``result`` is the place in ``node``, which may have lost that dimension.
    """

    kind: str
    node: Node
    operand: Node
    dim: int
    place: Place
    result: Place


@dataclass(frozen=True)
class Dropped:
    """``inner``, zeroed with probability ``rate`` and otherwise divided by ``1 - rate``."""

    node: Node
    rate: float
    inner: Expr


Atom = Leaf | Dot | Softmax | Reduced | Dropped
