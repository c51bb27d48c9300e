"""Attention for Hopper in Gluon, Triton's lower level: layouts, barriers and copies are written out.

The bodies (``forward``) and what compiles them are imported when a kernel is launched, so that this package can be
imported, and its kernel asked, where Triton is not installed.
"""

from __future__ import annotations

from attnfuse.kernels.gluon.hopper import Gluon

__all__ = ["Gluon"]
