"""The copy engine's instructions and its rooms, by one name each: Gluon's own names are others from Triton 3.8 on.

The newer name is asked for first: 3.9 still has the older ones, to say that they were removed.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["add", "load", "room_as", "store", "wait"]


@builtin
def _reduce_add(tensor_desc, coord, src, _semantic=None):
    """Gluon has no function for it up to 3.7."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


#: A tile from memory, by a descriptor and coordinates: barrier, room.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
#: A tile to memory, by a descriptor and coordinates: room. And the same, added to what is there.
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add
#: Waits until all but so many of them have been read from shared memory.
wait = tma.store_wait


@builtin
def room_as(room, dtype, shape, layout, _semantic=None):
    """Shared memory read as tiles of another shape and layout."""
    reinterpret = room.reinterpret if hasattr(room, "reinterpret") else room._reinterpret
    return reinterpret(dtype, shape, layout, _semantic=_semantic)
