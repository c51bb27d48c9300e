"""What layouts cost on a target: how fast copies are, and how much slower kernels read an operand of one layout.

One table for each target, ``<target>.json`` beside this file, is read when it is first asked for. What
``scripts/bench.py --layouts`` measures on a machine is kept in :func:`attnfuse.cache.folder` and goes before it, unless
``ATTNFUSE_CALIBRATE=0``. Each table names its source.
"""

from __future__ import annotations

from attnfuse.kernels.prices.table import Table, factor, measured_path, prices_of

__all__ = ["Table", "factor", "measured_path", "prices_of"]
