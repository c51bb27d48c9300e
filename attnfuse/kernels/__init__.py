"""The kernels: what each can compute, what it costs, and which is chosen."""

from __future__ import annotations

from attnfuse.kernels import measured
from attnfuse.kernels.choice import Candidate, Choice, choose, digest, modelled
from attnfuse.kernels.cpu import blocked as _blocked  # noqa: F401  (registers)
from attnfuse.kernels.cpu import direct as _direct  # noqa: F401  (registers)
from attnfuse.kernels.cpu import flex as _flex  # noqa: F401  (registers)
from attnfuse.kernels.cpu import sdpa as _sdpa  # noqa: F401  (registers)
from attnfuse.kernels.gluon import hopper as _hopper  # noqa: F401  (registers)
from attnfuse.kernels.gpu import cudnn as _cudnn  # noqa: F401  (registers)
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.problem import Numerics, Operand, Problem, Source
from attnfuse.kernels.registry import UNFUSED, kernel, kernels, lookup
from attnfuse.kernels.rows import rows_kept
from attnfuse.kernels.triton import kernel as _triton  # noqa: F401  (registers)

__all__ = [
    "UNFUSED",
    "Candidate",
    "Choice",
    "Kernel",
    "Numerics",
    "Operand",
    "Problem",
    "Residual",
    "Source",
    "choose",
    "digest",
    "kernel",
    "kernels",
    "lookup",
    "measured",
    "modelled",
    "rows_kept",
]
