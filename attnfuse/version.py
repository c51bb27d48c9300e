"""The version: one literal that the build, the cache keys and ``attnfuse --version`` all read."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
