"""Which contraction is that of queries and keys, and which of its sides is which."""

from __future__ import annotations

from torch.fx import Node

from attnfuse.axes import Axis
from attnfuse.passes.lift.atoms import Atom, Dot, Dropped, Place
from attnfuse.passes.lift.reader import Reader
from attnfuse.score import Capture, Expr, walk

__all__ = ["atoms_of", "axes_at", "query_and_key", "score_product"]


def atoms_of(reader: Reader, expr: Expr) -> list[Atom]:
    """The atoms an expression reads, through dropout."""
    found: list[Atom] = []
    for part in walk(expr):
        if isinstance(part, Capture):
            atom = reader.atoms[part.slot]
            found.append(atom)
            if isinstance(atom, Dropped):
                found += atoms_of(reader, atom.inner)
    return found


def score_product(reader: Reader, logit: Expr, keys: tuple[Axis, ...], value_place: Place) -> Dot | None:
    """The product of queries and keys: of the contractions in the logit that have the key axis on one side
    only, one whose other side has rows of its own, if any (a gate of each key has none); of these the one whose key
    side has the fewest axes that the values lack (a relative position has more), and of such the first: sites that
    share two products then agree which of them is the other's bias.
    """
    shared = axes_at(reader, value_place)
    candidates: list[tuple[bool, int, int, Dot]] = []
    for atom in atoms_of(reader, logit):
        if isinstance(atom, Dot):
            sides = (atom.left_place, atom.right_place)
            keyed = [place for place in sides if _reads_key(reader, place, keys)]
            if len(keyed) == 1:
                query, key = (axes_at(reader, place) for place in (sides[keyed[0] is sides[0]], keyed[0]))
                rowless = query <= shared | set(reader.space.resolve(atom.axes))
                candidates.append((rowless, len(key - shared), reader.order.position[atom.node], atom))
    return min(candidates, key=lambda c: c[:3])[3] if candidates else None


def axes_at(reader: Reader, place: Place) -> set[Axis]:
    """The axes that a place runs over."""
    return {axis for index in place for axis in reader.space.resolve(index.axes)}


def _reads_key(reader: Reader, place: Place, keys: tuple[Axis, ...]) -> bool:
    return bool(axes_at(reader, place) & set(reader.space.resolve(keys)))


def query_and_key(reader: Reader, inner: Dot, keys: tuple[Axis, ...]) -> tuple[tuple[Node, Place], tuple[Node, Place]]:
    """The two sides of the product of queries and keys."""
    left, right = (inner.left, inner.left_place), (inner.right, inner.right_place)
    return (right, left) if _reads_key(reader, inner.left_place, keys) else (left, right)
