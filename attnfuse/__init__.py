"""attnfuse finds attention written by hand in PyTorch graphs, proves what it computes, and fuses it.

Doors: :func:`fuse_graph` (a graph), :func:`rewrite` (an exported program), :func:`explain` (a model),
``torch.compile(model, backend="attnfuse")`` and the command line ``attnfuse``.
"""

from __future__ import annotations

from attnfuse.errors import AttnfuseError, BadInput, BadProgram, NoKernel, NotEquivalent, Refused
from attnfuse.explain import explain
from attnfuse.fuse import fuse_graph
from attnfuse.kernels import Kernel, Problem, kernel, kernels
from attnfuse.operands import Operands
from attnfuse.options import Options
from attnfuse.pt2 import rewrite
from attnfuse.report import Certificate, Fused, Report
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = [
    "AttentionSpec",
    "AttnfuseError",
    "BadInput",
    "BadProgram",
    "Certificate",
    "Fused",
    "Kernel",
    "NoKernel",
    "NotEquivalent",
    "Operands",
    "Options",
    "Problem",
    "Refused",
    "Report",
    "Target",
    "__version__",
    "explain",
    "fuse_graph",
    "kernel",
    "kernels",
    "rewrite",
]
