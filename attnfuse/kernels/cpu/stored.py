"""``attnfuse::stored``: a tensor in a buffer of its own, out of Inductor's sight.

Two things around flex_attention stop Inductor (torch 2.13) with an error: a captured tensor that it would rather
compute inside the loop than store, and a pointwise operation that it would fuse behind the loop. No operator of ATen
stores what it is given and nothing more, so this one copies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stored"]

_LIBRARY = torch.library.Library("attnfuse", "FRAGMENT")
_LIBRARY.define("stored(Tensor tensor, bool finite=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _stored(tensor: Tensor, finite: bool = False) -> Tensor:
    if finite and tensor.is_floating_point():
        tensor = torch.where(tensor.isfinite(), tensor, float("nan"))
    return tensor.clone(memory_format=torch.contiguous_format)


def _fake(tensor: Tensor, finite: bool = False) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_LIBRARY.impl("stored", _stored, "CompositeExplicitAutograd")
torch.library.register_fake("attnfuse::stored", _fake, lib=_LIBRARY)


def stored(tensor: Tensor, finite: bool = False) -> Tensor:
    """A contiguous copy; with ``finite`` promised, floats that are not become NaN."""
    copy: Tensor = torch.ops.attnfuse.stored.default(tensor, finite)
    return copy
