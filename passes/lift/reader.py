"""Reads the value of a node at a symbolic index: the interpreter that lift is built on.

Every node of a graph is a function from an index to a number. :meth:`Reader.read` asks for that number and
gets an expression back: views change the index, pointwise operations become operations, creation
operations (``arange``, ``full``) become index arithmetic, contractions and normalisers become atoms, and
whatever no rule understands is a leaf, which is always right because every node is a tensor that the
graph computes anyway. A spelling is thus never compared with a template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import partial, reduce
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from attnfuse.algebra import Kind, kind, normalise
from attnfuse.axes import Index, Size, Space, Unreadable
from attnfuse.graph import facts
from attnfuse.graph.order import Order
from attnfuse.passes.lift.atoms import Atom, Dot, Dropped, Leaf, Place, Reduced, Softmax
from attnfuse.passes.lift.constant import Constants
from attnfuse.passes.lift.gradient import is_cut_off
from attnfuse.score import Apply, Capture, Const, Expr, Symbol, apply, rewrite, walk
from attnfuse.score import Index as Variable

__all__ = ["Arguments", "Bound", "Reader", "Rule", "Rules", "TakeAsTensor"]

#: A call's arguments by name, as :func:`attnfuse.graph.facts.arguments` gives them.
Arguments = Mapping[str, Any]

#: ``rule(reader, node, arguments, place)`` is the node's value at that place; raises Unreadable to make it a leaf.
Rule = Callable[["Reader", Node, Arguments, Place], Expr]
Rules = Mapping[str, Rule]

#: What an input of a called program stands for: a number, or a node of the calling graph.
Bound = Expr | Node

#: Deeper chains and larger expressions than any mask or bias has; beyond them a value is a leaf.
_MAX_DEPTH = 150
_MAX_SIZE = 300


class TakeAsTensor(Exception):
    """A node that could be read, but whose value the fused node must be handed: the site is to be read again so."""

    def __init__(self, node: Node) -> None:
        """``node`` is to be among the next reader's ``opaque``."""
        super().__init__(node.name)
        self.node = node


class Reader:
    """Reads one site. All expressions it returns share its axes, atoms and symbols."""

    def __init__(
        self,
        rules: Rules,
        order: Order,
        is_given: Callable[[Node], bool] = lambda node: True,
        constants: Constants | None = None,
        opaque: frozenset[Node] = frozenset(),
        flows: frozenset[Node] = frozenset(),
        *,
        narrow: bool = True,
    ) -> None:
        """``is_given`` says which nodes' values a fused node could be handed; only those can be leaves.

        Nodes in ``opaque`` are leaves whatever rules there are, and so is what cuts off the gradient that flows back
        from those in ``flows``. With ``narrow`` operands that are dequantised are seen as the float8 tensors they were.
        """
        self.space = Space()
        self.atoms: list[Atom] = []
        self.symbols: list[Size] = []
        self.narrow = narrow
        #: Which axis an index variable of an expression runs over.
        self.axes: dict[str, Index] = {}
        self.order = order
        self._rules, self._is_given, self._opaque, self._flows = rules, is_given, opaque, flows
        self._constants = constants or Constants()
        self._slots: dict[Atom, int] = {}
        self._settled: set[Expr] = set()
        self._outer, self._bound = self, cast("Mapping[Node, Bound]", {})
        self._memo: dict[tuple[Node, Place, bool], Expr] = {}
        self._depth = 0
        self._unlimited: Reader | None = None
        self._consumer: Node | None = None
        #: Nodes in the order they were read.
        self.trail: list[tuple[Node, Place]] = []
        #: The first node that each was read by.
        self.consumer: dict[Node, Node] = {}
        #: Why a node that has a rule was left unread.
        self.unread: dict[Node, str] = {}

    def limited_to(self, rules: Rules, consumer: Node) -> Reader:
        """A reader with fewer rules that shares everything found so far; it reads what ``consumer`` reads."""
        other = copy(self)
        other._rules, other._memo, other.trail, other._consumer = rules, {}, [], consumer
        other._unlimited = self
        # an operand stays a tensor, even one of equal numbers
        other._constants = Constants()
        return other

    def unlimited(self) -> Reader:
        """The reader with all rules that this one was made from, reading what this one reads."""
        other = copy(self._unlimited or self)
        other._consumer = self._consumer
        return other

    def of_values(self) -> Reader:
        """A reader of what is computed, gradients aside."""
        other = copy(self)
        # what has a gradient is what it was found to be: a product has one inner axis
        other._memo = {read: found for read, found in self._memo.items() if read[0] in self._flows}
        other._flows = frozenset()
        return other

    def inside(self, order: Order, bound: Mapping[Node, Bound], consumer: Node) -> Reader:
        """A reader of a program that ``consumer`` calls: its inputs are ``bound`` to numbers or this graph's nodes."""
        outer, inner = copy(self), copy(self)
        outer._consumer = consumer
        inner.order, inner._outer, inner._bound = order, outer, bound
        inner._memo, inner.trail, inner.consumer, inner._consumer = {}, [], {}, None
        return inner

    def read(self, node: Node, place: Place) -> Expr:
        """The value of a tensor node at ``place``, one index for each dimension.

        It is read as of the node whose rule asks for it. Where somebody wrote into it since it was made, what
        made it no longer says what it holds: it is a leaf.
        """
        place = self.final(place)
        changed = self._consumer is not None and self.order.is_written_between(node, self._consumer)
        self._note_consumer(node)
        if (node, place, changed) not in self._memo:
            self.trail.append((node, place))
            self._memo[node, place, changed] = self.leaf(node, place) if changed else self._interpret(node, place)
        return self._memo[node, place, changed]

    def read_as(self, expr: Expr) -> Iterator[Leaf]:
        """The nodes whose value was found to be ``expr``, with where."""
        return (Leaf(node, place) for (node, place, _), found in self._memo.items() if found == expr)

    def _note_consumer(self, node: Node) -> None:
        reader, known = self._consumer, self.consumer.get(node)
        if reader is not None and (known is None or self.order.before(reader, known)):
            self.consumer[node] = reader

    def _interpret(self, node: Node, place: Place) -> Expr:
        if node in self._bound:
            given = self._bound[node]
            return self._outer.read(given, place) if isinstance(given, Node) else given
        name = facts.op_name(node)
        rule = self._rules.get(name) or self._rules.get(name.rstrip("_"))
        if node in self._opaque:
            return self.leaf(node, place)
        if rule is None or self._depth > _MAX_DEPTH:
            return self._constant(node, place) or self.leaf(node, place)
        before, self._consumer = self._consumer, node
        self._depth += 1
        try:
            found = self.normal(rule(self, node, facts.arguments(node), place))
        except Unreadable as error:
            self.unread[node] = str(error)
            return self.leaf(node, place)
        finally:
            self._depth -= 1
            self._consumer = before
        if is_cut_off(node, found, self.atoms, self._flows):
            return self._stopped(node, place, found)
        return found if self._is_usable(found) else self.leaf(node, place)

    def _stopped(self, node: Node, place: Place, found: Expr) -> Expr:
        """A value whose gradient is cut off. A row's maximum stays one: where it is subtracted it has no gradient."""
        match found:
            case Capture(slot) if isinstance(atom := self.atoms[slot], Reduced) and atom.kind == "max":
                return self.atom(replace(atom, node=node, result=self.final(place)))
        self.unread[node] = "a gradient is cut off between the scores and the product with the values"
        return self.leaf(node, place)

    def _constant(self, node: Node, place: Place) -> Expr | None:
        """The value of a tensor that is never changed, where it is index arithmetic."""
        formula = self._constants.formula(node, place)
        if formula is None:
            return None
        names = ("column",) if len(formula.dims) == 1 else ("row", "column")
        at = {name: self.position(place[dim]) for name, dim in zip(names, formula.dims, strict=False)}

        def positioned(part: Expr) -> Expr:
            return at[part.axis] if isinstance(part, Variable) and part.axis in at else part

        return self.normal(rewrite(formula.expr, positioned))

    def _is_usable(self, expr: Expr) -> bool:
        """A leaf must be a plain view of its node, since that is how the fused node will be given it."""
        parts = list(walk(expr))
        atoms = [self.atoms[part.slot] for part in parts if isinstance(part, Capture)]
        return len(parts) <= _MAX_SIZE and all(self.is_plain(a) for a in atoms if isinstance(a, Leaf))

    def is_plain(self, leaf: Leaf) -> bool:
        """Whether the leaf's value can be had, and each of its dimensions is covered by axes of its own."""
        axes = [axis for index in leaf.place for axis in self.space.resolve(index.axes)]
        whole = all(i.covers(size) for i, size in zip(leaf.place, facts.shape(leaf.node), strict=True))
        return whole and len(set(axes)) == len(axes) and self._is_given(leaf.node)

    def final(self, place: Place) -> Place:
        """The place in axes that are split no further."""
        return tuple(map(self.space.resolved, place))

    # --- atoms --------------------------------------------------------------------------------------

    def leaf(self, node: Node, place: Place) -> Capture:
        """The node's value, unread."""
        return self.atom(Leaf(node, self.final(place)))

    def atom(self, atom: Atom) -> Capture:
        """The slot of an atom; equal atoms share one."""
        if atom not in self._slots:
            self._slots[atom] = len(self.atoms)
            self.atoms.append(atom)
        return Capture(self._slots[atom])

    def kind_of(self, slot: int) -> Kind:
        """bool, int or float: what the atom in a slot is."""
        match self.atoms[slot]:
            case Leaf(node) | Dot(node) | Reduced(node=node):
                return facts.kind(node)
            case Reduced("any"):
                return "bool"
        return "float"

    def is_score_or_weight(self, slot: int) -> bool:
        """Whether the atom in a slot is a contraction, or comes from a normaliser."""
        return isinstance(self.atoms[slot], (Dot, Softmax, Reduced, Dropped))

    def kind(self, expr: Expr) -> Kind:
        """bool, int or float: what an expression of this reader evaluates to."""
        return kind(expr, self.kind_of)

    def normal(self, expr: Expr) -> Expr:
        """The normal form of an expression of this reader."""
        return normalise(expr, self.kind_of, settled=self._settled)

    # --- numbers ------------------------------------------------------------------------------------

    def scalar(self, argument: object) -> Expr:
        """A number, a symbolic size, a zero-dimensional tensor, or ``tensor.item()``."""
        match argument:
            case bool() | int() | float():
                return Const(argument)
            case Node() if facts.is_tensor(argument) and facts.rank(argument) == 0:
                return self.read(argument, ())
            case Node() if facts.op_name(argument) in ("item", "_local_scalar_dense"):
                (source,) = argument.all_input_nodes
                return self.leaf(source, (Index(),) * facts.rank(source))
            case Node() | torch.SymInt() | torch.SymFloat():
                number = facts.value(argument) if isinstance(argument, Node) else argument
                if isinstance(number, torch.SymFloat):
                    raise Unreadable(f"{number.node.expr} is made of sizes, and is no whole number")
                return self.size(facts.size_of(number))
        raise Unreadable(f"{argument!r} is not a number")

    def size(self, size: Size) -> Expr:
        """A size as an expression: a literal, or a symbol whose value the fused node is given."""
        if isinstance(size, int):
            return Const(size)
        if isinstance(size, (sympy.Add, sympy.Mul)):
            op = "add" if isinstance(size, sympy.Add) else "mul"
            return reduce(partial(apply, op), map(self.size, map(facts.size_of, size.args)))
        if size not in self.symbols:
            self.symbols.append(size)
        return Symbol(self.symbols.index(size))

    def position(self, index: Index) -> Expr:
        """The number that an index stands for."""
        total: Expr = Const(0)
        for axis in index.axes:
            self.axes[axis.name] = Index((axis,))
            total = apply("add", apply("mul", total, self.size(axis.size)), Variable(axis.name))
        total = apply("add", total, self.size(index.offset))
        return self.normal(total)

    def as_index(self, expr: Expr) -> Index:
        """The index that a number stands for, where it is one axis plus a constant."""
        match expr:
            case Const(int(value)):
                return Index((), value)
            case Variable(axis):
                return self.axes[axis]
            case Apply("add", (Variable(axis), Const(int(value)))):
                return Index(self.axes[axis].axes, value)
        raise Unreadable("the index is not an axis plus a constant")
