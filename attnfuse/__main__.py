"""``python -m attnfuse``."""

from __future__ import annotations

from attnfuse.cli import main

if __name__ == "__main__":
    main()
