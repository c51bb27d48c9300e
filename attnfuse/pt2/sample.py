"""Inputs to try a program on, drawn from what its signature and its sample inputs allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.fx import Node
from torch.utils import _pytree as pytree  # torch offers no public one

from attnfuse.graph import facts

__all__ = ["OTHER_SIZES", "Sample", "samples"]

#: The sample that a program may refuse: its guards can be narrower than its declared ranges.
OTHER_SIZES = "random inputs of other sizes"

Sizes = dict[sympy.Symbol, int]


@dataclass(frozen=True)
class Sample:
    """Arguments of a program's graph, state included, in placeholder order.

    ``name`` says how they were drawn, ``writable`` which of them the program may write into.
    """

    name: str
    arguments: tuple[Any, ...]
    writable: tuple[bool, ...]

    def copied(self) -> list[Any]:
        """The arguments for one run, with what may be written into cloned."""
        pairs = zip(self.arguments, self.writable, strict=True)
        return [part.clone() if writable and isinstance(part, Tensor) else part for part, writable in pairs]

    def written(self, arguments: list[Any]) -> list[Any]:
        """Those of ``arguments``, after a run, that the program may have written into."""
        return [part for part, writable in zip(arguments, self.writable, strict=True) if writable]


def samples(program: ExportedProgram, *, resample: bool, seed: int = 0) -> Iterator[Sample]:
    """The program's own sample inputs, random ones of their sizes, and random ones of other sizes it admits.

    Floats are drawn from a normal distribution. Integers (token ids, positions, masks) are only known to
    be valid where the sample inputs have them, so they are drawn from those; without ``resample`` they
    are taken in order, so that no padding pattern arises which the program's owner has not shown.
    """
    saved = _saved_inputs(program)
    traced = _traced_sizes(program)
    other = _other_sizes(program, traced)
    generator = torch.Generator().manual_seed(seed)
    if saved:
        yield _sample("saved inputs", program, saved.__getitem__)
    yield _sample("random inputs", program, _Draw(saved, traced, generator, resample))
    if other != traced:
        yield _sample(OTHER_SIZES, program, _Draw(saved, other, generator, resample))


def _sample(name: str, program: ExportedProgram, draw: Callable[[Node], Any]) -> Sample:
    writable = tuple(spec.kind != InputKind.PARAMETER for _, spec in _placeholders(program))
    return Sample(name, tuple(_bound(program, draw)), writable)


def _bound(program: ExportedProgram, draw: Callable[[Node], Any]) -> Iterator[Any]:
    state = {**program.constants, **program.state_dict}
    for node, spec in _placeholders(program):
        if spec.kind != InputKind.USER_INPUT:
            yield state[spec.target or ""]
        elif isinstance(spec.arg, ConstantArgument):
            yield spec.arg.value
        else:
            yield draw(node)


def _placeholders(program: ExportedProgram) -> list[tuple[Node, InputSpec]]:
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return list(zip(nodes, program.graph_signature.input_specs, strict=True))


def _user_inputs(program: ExportedProgram) -> list[Node]:
    return [node for node, spec in _placeholders(program) if spec.kind == InputKind.USER_INPUT]


def _saved_inputs(program: ExportedProgram) -> dict[Node, Any]:
    """The sample inputs that travel with a program, by placeholder; empty when there are none."""
    if program.example_inputs is None:
        return {}
    nodes, leaves = _user_inputs(program), pytree.tree_leaves(program.example_inputs)
    return dict(zip(nodes, leaves, strict=True)) if len(nodes) == len(leaves) else {}


def _traced_sizes(program: ExportedProgram) -> Sizes:
    """The size each symbol had when the program was exported."""
    found: Sizes = {}
    for node in _user_inputs(program):
        if not facts.is_tensor(node):
            continue
        for size, traced in zip(map(sympy.sympify, facts.shape(node)), facts.hint(node), strict=True):
            for symbol in size.free_symbols - found.keys():
                solution = sympy.solve(sympy.Eq(size.subs(found), traced), symbol)
                found[symbol] = int(solution[0])
    return found


def _other_sizes(program: ExportedProgram, traced: Sizes) -> Sizes:
    """One more or one less than was traced, where the declared range has it."""
    other = dict(traced)
    for symbol, size in traced.items():
        admitted = program.range_constraints.get(symbol)
        inside = [n for n in (size + 1, size - 1) if admitted is not None and admitted.lower <= n <= admitted.upper]
        other[symbol] = inside[0] if inside else size
    return other


@dataclass(frozen=True)
class _Draw:
    """Draws a placeholder's argument."""

    saved: dict[Node, Any]
    sizes: Sizes
    generator: torch.Generator
    resample: bool

    def __call__(self, node: Node) -> Any:
        if not facts.is_tensor(node):
            size = facts.value(node)
            return int(sympy.sympify(facts.size_of(size)).subs(self.sizes)) if size is not None else None
        fake = facts.tensor(node)
        shape = [int(sympy.sympify(size).subs(self.sizes)) for size in facts.shape(node)]
        if fake.dtype.is_floating_point or fake.dtype.is_complex:
            return torch.randn(shape, generator=self.generator).to(fake.device, fake.dtype)
        return self._integers(self.saved.get(node), shape).to(fake.device, fake.dtype)

    def _integers(self, saved: Tensor | None, shape: list[int]) -> Tensor:
        known = torch.tensor([0, 1]) if saved is None or saved.numel() == 0 else saved.cpu().flatten()
        count = torch.Size(shape).numel()
        if self.resample:
            return known[torch.randint(known.numel(), (count,), generator=self.generator)].reshape(shape)
        return known[torch.arange(count) % known.numel()].reshape(shape)
