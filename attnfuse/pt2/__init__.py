"""Exported programs: read, rewritten, verified and written."""

from __future__ import annotations

from attnfuse.pt2.archive import load, save
from attnfuse.pt2.equivalence import check
from attnfuse.pt2.rewrite import rewrite

__all__ = ["check", "load", "rewrite", "save"]
