"""Attention in Triton: one body an algorithm, driven by a schedule, for any score program.

``text`` and ``logit`` know nothing of Triton; the bodies (``forward``, ``keys_outside``, ``backward``) are imported
when a kernel is launched, so that this package can be imported, and its kernel asked, where Triton is not
installed.
"""

from __future__ import annotations

from attnfuse.kernels.triton.listing import Listing, Mask
from attnfuse.kernels.triton.logit import Logit, logit_of
from attnfuse.kernels.triton.text import function_text, untranslatable

__all__ = ["Listing", "Logit", "Mask", "function_text", "logit_of", "untranslatable"]
