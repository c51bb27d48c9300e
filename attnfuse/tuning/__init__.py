"""``attnfuse tune``: measures the kernels on this machine, and keeps what the cost model is corrected by."""

from __future__ import annotations

from attnfuse.tuning.figures import Figure, as_measured, measure
from attnfuse.tuning.session import Wanted, run
from attnfuse.tuning.shapes import standard

__all__ = ["Figure", "Wanted", "as_measured", "measure", "run", "standard"]
