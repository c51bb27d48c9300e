"""Gluon's language in plain Python, as far as the forward body speaks it: what the body computes, without a GPU.

Partitions are threads, tensors are torch's without layouts. A product in flight is computed when it is waited for, the
last moment at which its operands may be read, so a room that is freed too early shows; so does a barrier whose phases
do not add up, as a thread that waits for too long. What compilers make of the body shows elsewhere (``test_compile``).
"""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.gluon import forward as real

__all__ = ["Descriptor", "Pointer", "body", "language", "launch"]

#: Seconds after which a thread waits for a phase that never comes.
PATIENCE = 60.0
_CHANGED = threading.Condition()
_HERE = threading.local()
#: Of the partitions that run: when one fails, the others stop waiting for it.
_FAILURES: list[BaseException] = []


class Block(Tensor):
    """A tensor that can be asked for a layout, which it does not have."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        """What the body derives layouts from."""
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:  # type: ignore[override]
        """Converted; bits that :class:`Carried` kept are of the type already."""
        return self if bitcast else Tensor.to(self, dtype)


def block(tensor: Tensor | float) -> Any:
    """As a :class:`Block`."""
    return torch.as_tensor(tensor).as_subclass(Block)


# --- memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor in memory, by their offsets."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


@dataclass(frozen=True)
class Descriptor:
    """A tensor in memory, and the tile that a copy of it has."""

    memory: Tensor
    tile: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.memory.dtype

    @property
    def layout(self) -> Any:
        """What the body derives another layout from."""
        return SimpleNamespace(swizzle_byte_width=128)

    @property
    def block_type(self) -> Any:
        """The tile as the body asks for it."""
        return SimpleNamespace(shape=list(self.tile), nbytes=math.prod(self.tile) * self.memory.dtype.itemsize)

    def window(self, at: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tile at ``at`` that is in memory, and where in the tile that is."""
        spans = [
            (max(int(a), 0), min(int(a) + n, size)) for a, n, size in zip(at, self.tile, self.memory.shape, strict=True)
        ]
        part = self.memory[tuple(slice(start, max(stop, start)) for start, stop in spans)]
        return part, tuple(slice(0, size) for size in part.shape)


@dataclass(frozen=True)
class Room:
    """Shared memory: a view of what was allocated."""

    view: Any

    @property
    def shape(self) -> list[int]:
        return list(self.view.shape)

    def index(self, place: Any) -> Any:
        found = self.view[int(place)]
        return found[0] if isinstance(found, list) else Room(found)

    def reshape(self, shape: Sequence[int]) -> Room:
        return Room(self.view.view(shape))

    def permute(self, order: Sequence[int]) -> Room:
        return Room(self.view.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
        return Room(self.view.view(-1).view(dtype).view(shape))

    def load(self, layout: object) -> Any:
        return block(self.view.clone())

    def store(self, value: Tensor) -> None:
        self.view.copy_(value)


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
    if layout == "barriers":
        return Room([[Barrier()] for _ in range(shape[0])])
    # what nobody wrote is no number
    made = torch.zeros(list(shape), dtype=dtype)
    return Room(made.view(torch.uint8).fill_(0xFF).view(dtype))


# --- barriers and copies ----------------------------------------------------------------------------


@dataclass(eq=False)
class Barrier:
    """Complete when so many have arrived and all bytes have landed; then the next phase begins."""

    count: int = 0
    missing: int = 0
    landing: int = 0
    phase: int = 0

    def moved(self, arrivals: int, landing: int) -> None:
        with _CHANGED:
            self.missing -= arrivals
            self.landing += landing
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.landing == 0:
                self.phase, self.missing = self.phase + 1, self.count
            _CHANGED.notify_all()


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.missing = count


def _wait(bar: Barrier, parity: Any) -> None:
    with _CHANGED:
        assert _CHANGED.wait_for(lambda: _FAILURES or bar.phase % 2 != int(parity), PATIENCE), "a phase never comes"
        assert not _FAILURES, "another partition failed"


def _read(desc: Descriptor, at: Sequence[Any], bar: Barrier, room: Room) -> None:
    part, where = desc.window(at)
    room.view.view(torch.uint8).zero_()
    room.view[where].copy_(part)
    bar.moved(0, -desc.block_type.nbytes)


def _write(desc: Descriptor, at: Sequence[Any], room: Room) -> None:
    part, where = desc.window(at)
    part.copy_(room.view[where])


# --- products ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Product:
    """A product in flight."""

    left: Any
    right: Room
    added: Any

    def value(self) -> Any:
        left = self.left.view if isinstance(self.left, Room) else self.left
        found = left.float() @ self.right.view.float()
        return block(found if self.added is None else found + self.added)


def _multiply(left: Any, right: Room, added: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    made = Product(left, right, added if use_acc else None)
    _HERE.flight.append(made)
    return made


def _wait_for_products(pending: int, deps: Sequence[Any]) -> Any:
    done = {}
    while len(_HERE.flight) > pending:
        made = _HERE.flight.pop(0)
        done[made] = made.value()
    assert all(not isinstance(each, Product) or each in done for each in deps), "used before it is there"
    found = tuple(done[each] if isinstance(each, Product) else each for each in deps)
    return found if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Carried:
    """Four bytes in each register: the four tensors that they came from."""

    parts: tuple[Any, ...]


def _assembly(text: str, constraints: str, given: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if text == real.AS_BYTES.value:
        return given[0].parts
    if text.startswith("tanh"):
        return block(given[0].tanh())
    assert text in (real.TO_E4M3.value, real.TO_E5M2.value)
    rounded = torch.float8_e4m3fn if text == real.TO_E4M3.value else torch.float8_e5m2
    largest = torch.finfo(rounded).max
    return Carried(tuple(block(x.clamp(-largest, largest).to(rounded)) for x in given))


# --- partitions -------------------------------------------------------------------------------------


def _specialise(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
    index = _HERE.index
    _FAILURES.clear()

    def run(function: Callable[..., None], given: tuple[Any, ...]) -> None:
        _HERE.index, _HERE.flight = index, []
        try:
            function(*given)
            assert not _HERE.flight, "a product that nobody waited for"
        except BaseException as failure:  # noqa: BLE001 - raised again where the launch is
            with _CHANGED:
                _FAILURES.append(failure)
                _CHANGED.notify_all()

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if _FAILURES:
        raise _FAILURES[0]


def _atomic_add(pointer: Pointer, more: int, sem: str) -> Any:
    with _CHANGED:
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


def _layout(*_: object, **__: object) -> None:
    return None


def _tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: block(function(*map(torch.as_tensor, given), **named))


def language(grid: int) -> SimpleNamespace:
    """What the body calls ``gl``; programs call it ``tl``."""
    types = {name: getattr(torch, name) for name in ("int32", "int64", "float32", "int8")}
    layouts = ("NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout", "BlockedLayout", "DotOperandLayout")
    return SimpleNamespace(
        **types, **dict.fromkeys((*layouts, "SwizzledSharedLayout"), _layout),
        constexpr=lambda x: x, static_range=range, program_id=lambda _: block(_HERE.index),
        num_programs=lambda _: grid, float8e4nv=torch.float8_e4m3fn, float8e5=torch.float8_e5m2,
        cdiv=lambda a, b: -(-a // b), minimum=_tensors(torch.minimum), maximum=_tensors(torch.maximum),
        where=_tensors(torch.where), exp2=_tensors(torch.exp2), log2=_tensors(torch.log2),
        full=lambda shape, value, dtype, layout: block(torch.full(list(shape), value, dtype=dtype)),
        arange=lambda start, stop, layout: block(torch.arange(start, stop)),
        expand_dims=lambda x, axis: x.unsqueeze(axis), convert_layout=lambda x, layout: x,
        sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis),
        split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack([a, b], -1),
        allocate_shared_memory=_allocate, warp_specialize=_specialise, atomic_add=_atomic_add, load=_load,
        store=_store, abs=torch.abs, inline_asm_elementwise=_assembly,
    )  # fmt: skip


def body(gl: SimpleNamespace) -> dict[str, Any]:
    """The forward's functions in this language."""
    tree = ast.parse(Path(str(real.__file__)).read_text(encoding="utf-8"))
    tree.body = [
        each for each in tree.body if not (isinstance(each, ast.ImportFrom) and str(each.module).startswith("triton"))
    ]
    jit = SimpleNamespace(jit=lambda *given, **_: given[0] if given else (lambda function: function))
    names: dict[str, Any] = {
        "gl": gl, "gluon": jit, "__name__": "plain_forward",
        "fence_async_shared": lambda: None, "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait_for_products,
        "mbarrier": SimpleNamespace(
            init=_init, wait=_wait, MBarrierLayout=lambda: "barriers",
            expect=lambda bar, size: bar.moved(1, size), arrive=lambda bar, count: bar.moved(count, 0),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=_read, async_copy_shared_to_global=_write, store_wait=lambda _: None
        ),
    }  # fmt: skip
    exec(compile(tree, "<forward in plain Python>", "exec"), names)
    return names


def launch(names: dict[str, Any], grid: int, *given: Any) -> None:
    """Runs every block of a grid, one after the other."""
    for index in range(grid):
        _HERE.index = index
        names["attention_forward"](*given)
