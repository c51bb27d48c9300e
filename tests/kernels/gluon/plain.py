"""Gluon's language in plain Python, as far as the forward body speaks it: what the body computes, without a GPU.

Partitions are threads, tensors are torch's without layouts. A product in flight is computed when it is waited for, the
last moment at which its operands may be read, so a room that is freed too early shows; so does a barrier whose phases
do not add up, as a thread that waits for too long. What compilers make of the body shows elsewhere (``test_compile``).
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.gluon import forward as real
from tests.kernels.gluon.plain_memory import (
    CHANGED,
    FAILURES,
    Descriptor,
    Pointer,
    Room,
    allocate,
    block,
    init,
    read,
    wait,
    write,
)  # fmt: skip

__all__ = ["Descriptor", "Pointer", "block", "body", "language", "launch"]

_HERE = threading.local()


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
    FAILURES.clear()

    def run(function: Callable[..., None], given: tuple[Any, ...]) -> None:
        _HERE.index, _HERE.flight = index, []
        try:
            function(*given)
            assert not _HERE.flight, "a product that nobody waited for"
        except BaseException as failure:  # noqa: BLE001 - raised again where the launch is
            with CHANGED:
                FAILURES.append(failure)
                CHANGED.notify_all()

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if FAILURES:
        raise FAILURES[0]


def _atomic_add(pointer: Pointer, more: int, sem: str) -> Any:
    with CHANGED:
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
        allocate_shared_memory=allocate, warp_specialize=_specialise, atomic_add=_atomic_add, load=_load,
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
            init=init, wait=wait, MBarrierLayout=lambda: "barriers",
            expect=lambda bar, size: bar.moved(1, size), arrive=lambda bar, count: bar.moved(count, 0),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=read, async_copy_shared_to_global=write, store_wait=lambda _: None
        ),
    }  # fmt: skip
    exec(compile(tree, "<forward in plain Python>", "exec"), names)
    return names


def launch(names: dict[str, Any], grid: int, *given: Any) -> None:
    """Runs every block of a grid, one after the other."""
    for index in range(grid):
        _HERE.index = index
        names["attention_forward"](*given)
