"""Gluon's language in plain Python, as far as the bodies speak it: what a body computes, without a GPU.

Partitions are threads that take turns, tensors are torch's without layouts. A product in flight is computed when it is
waited for, the last moment at which its operands may be read, and fails where they changed since it began; so a room
that is freed too early shows. So does a barrier whose phases do not add up, as partitions that all wait. What compilers
make of the body shows elsewhere (``test_compile``).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.gluon import forward
from tests.kernels.gluon import plain_copies as copies
from tests.kernels.gluon.plain_memory import Pointer, Room, block, fence, unfenced
from tests.kernels.gluon.plain_turns import HERE, Turns, others_first

__all__ = ["language", "launch", "spoken"]

# --- products ---------------------------------------------------------------------------------------


def _bits(operand: Tensor) -> Tensor:
    return operand.contiguous().view(torch.uint8)


@dataclass(eq=False)
class Product:
    """A product in flight, and its value when it is there."""

    left: Any
    right: Any
    added: Any
    value: Any = None
    began: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert not any(unfenced(each) for each in self._rooms()), "a product of what no fence has shown it"
        self.began = [_bits(each.view).clone() for each in self._rooms()]

    def _rooms(self) -> list[Room]:
        return [each for each in (self.left, self.right) if isinstance(each, Room)]

    def finish(self) -> None:
        for before, room in zip(self.began, self._rooms(), strict=True):
            assert torch.equal(before, _bits(room.view)), "an operand changed while its product was in flight"
        left, right = (each.view if isinstance(each, Room) else each for each in (self.left, self.right))
        found = left.float() @ right.float()
        before = self.added.value if isinstance(self.added, Product) else self.added
        self.value = block(found if before is None else found + before)


def _multiply(left: Any, right: Room, added: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    made = Product(left, right, added if use_acc else None)
    HERE.flight.append(made)
    return made


def _wait_for_products(pending: int, deps: Sequence[Any]) -> Any:
    others_first()
    while len(HERE.flight) > pending:
        HERE.flight.pop(0).finish()
    found = tuple(each.value if isinstance(each, Product) else each for each in deps)
    assert not any(each is None for each in found), "used before it is there"
    return found if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Carried:
    """Four bytes in each register: the four tensors that they came from."""

    parts: tuple[Any, ...]


def _assembly(text: str, constraints: str, given: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if text == forward.AS_BYTES.value:
        return given[0].parts
    if text.startswith("tanh"):
        return block(given[0].tanh())
    assert text in (forward.TO_E4M3.value, forward.TO_E5M2.value)
    rounded = torch.float8_e4m3fn if text == forward.TO_E4M3.value else torch.float8_e5m2
    largest = torch.finfo(rounded).max
    return Carried(tuple(block(x.clamp(-largest, largest).to(rounded)) for x in given))


# --- partitions -------------------------------------------------------------------------------------


def _specialise(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
    index, speed = HERE.index, HERE.speed

    def run(function: Callable[..., None], given: tuple[Any, ...]) -> None:
        HERE.index, HERE.flight, HERE.leaving, HERE.stored = index, [], [], set()
        function(*given)
        assert not HERE.flight, "a product that nobody waited for"
        assert not HERE.leaving, "a copy that nobody waited for"

    Turns(speed or range(len(partitions))[::-1]).run([partial(run, *each) for each in partitions])


def _atomic_add(pointer: Pointer, more: int, sem: str) -> Any:
    before = pointer.memory.clone()
    pointer.memory.add_(more)
    return block(before)


def _load(pointer: Pointer) -> Any:
    return block(pointer.memory[torch.as_tensor(pointer.offset).long()])


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if mask is None:
        pointer.memory.fill_(int(value))
        return
    kept = torch.as_tensor(mask)
    pointer.memory[torch.as_tensor(pointer.offset).long().expand(kept.shape)[kept]] = value[kept].as_subclass(Tensor)


# --- the language -----------------------------------------------------------------------------------


class _Layout:
    """What says nothing here."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return None

    @staticmethod
    def get_default_for(*_: object) -> None:
        return None


def _tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: block(function(*map(torch.as_tensor, given), **named))


def language(grid: int) -> SimpleNamespace:
    """What the body calls ``gl``; programs call it ``tl``."""
    types = {name: getattr(torch, name) for name in ("int32", "int64", "float32", "int8")}
    layouts = ("NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout", "BlockedLayout", "DotOperandLayout")
    return SimpleNamespace(
        **types, **dict.fromkeys((*layouts, "SwizzledSharedLayout"), _Layout),
        constexpr=lambda x: x, static_range=range, program_id=lambda _: block(HERE.index),
        num_programs=lambda _: grid, float8e4nv=torch.float8_e4m3fn, float8e5=torch.float8_e5m2,
        cdiv=lambda a, b: -(-a // b), minimum=_tensors(torch.minimum), maximum=_tensors(torch.maximum),
        where=_tensors(torch.where), exp2=_tensors(torch.exp2), log2=_tensors(torch.log2),
        full=lambda shape, value, dtype, layout: block(torch.full(list(shape), value, dtype=dtype)),
        arange=lambda start, stop, layout=None: block(torch.arange(start, stop)),
        expand_dims=lambda x, axis: x.unsqueeze(axis), convert_layout=lambda x, layout: x,
        reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.permute(order),
        sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis),
        split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack([a, b], -1),
        allocate_shared_memory=copies.allocate, warp_specialize=_specialise, atomic_add=_atomic_add, load=_load,
        store=_store, abs=torch.abs, inline_asm_elementwise=_assembly, num_warps=lambda: 4,
    )  # fmt: skip


def _range(*bounds: Any) -> Any:
    """Whose numbers are a kernel's where its bounds are."""
    found = builtins.range(*map(int, bounds))
    return map(block, found) if any(isinstance(each, Tensor) for each in bounds) else found


def spoken(module: ModuleType, gl: SimpleNamespace, *changes: tuple[str, str]) -> dict[str, Any]:
    """A module's functions in this language, after ``changes`` of its text, each of which is there once."""
    jit = SimpleNamespace(jit=lambda *given, **_: given[0] if given else (lambda function: function))
    names: dict[str, Any] = {
        "gl": gl, "tl": gl, "gluon": jit, "triton": jit, "builtin": lambda function: function, "range": _range,
        "__name__": f"plain_{module.__name__}",
        "fence_async_shared": fence, "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait_for_products,
        "mbarrier": SimpleNamespace(
            init=copies.init, wait=copies.wait, MBarrierLayout=lambda: "barriers", expect=copies.expect,
            arrive=copies.arrive,
        ),
    }  # fmt: skip
    exec(_compiled(module, changes), names)
    # what the module imports of ours is Gluon's
    names["copies"] = SimpleNamespace(
        load=copies.read, store=copies.write, add=copies.add, wait=copies.store_wait, room_as=Room.read_as
    )
    return names


@cache
def _compiled(module: ModuleType, changes: tuple[tuple[str, str], ...]) -> CodeType:
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times in the text: {old}"
        text = text.replace(old, new)
    tree = ast.parse(text)
    tree.body = [each for each in tree.body if not _imports_triton(each)]
    return compile(tree, f"<{module.__name__} in plain Python>", "exec")


def _imports_triton(statement: ast.stmt) -> bool:
    named = isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("triton")
    return named or (isinstance(statement, ast.Import) and statement.names[0].name.startswith("triton"))


def launch(body: Callable[..., None], grid: int, *given: Any, speed: Sequence[int] = ()) -> None:
    """Runs every block of a grid, one after the other; of partitions the last is the fastest, unless ``speed`` says."""
    for index in range(grid):
        HERE.index, HERE.speed, HERE.barriers = index, speed, []
        body(*given)
        assert not any(bar.copies for bar in HERE.barriers), "a copy that nobody waited for"
