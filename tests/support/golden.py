"""Golden files: text that was once read by a person, held against what is computed now."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Golden"]

_FOLDER = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Golden:
    """``golden(text, name)`` compares with ``<folder>/<name>.txt``, or rewrites it when ``update`` is set."""

    update: bool = False
    folder: Path = _FOLDER

    def __call__(self, text: str, name: str) -> None:
        """Fails with a diff that leads from the stored text to the computed one."""
        file = self.folder / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if self.update:
            file.write_text(text, encoding="utf-8")
            return
        stored = file.read_text(encoding="utf-8") if file.exists() else ""
        if stored != text:
            pytest.fail(f"{file.name} differs; --update-golden accepts it\n{_diff(stored, text)}", pytrace=False)


def _diff(stored: str, computed: str) -> str:
    lines = difflib.unified_diff(stored.splitlines(), computed.splitlines(), "stored", "computed", lineterm="")
    return "\n".join(lines)
