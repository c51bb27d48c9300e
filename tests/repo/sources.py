"""The project's own Python files, each once and under its real name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the package; ``passes/`` appears as ``attnfuse.passes``."""
    for folder, prefix in ((ROOT / "attnfuse", "attnfuse"), (ROOT / "passes", "attnfuse.passes")):
        for path in sorted(_python_files(folder)):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((prefix, *(part for part in parts if part != "__init__"))), path


def everything() -> Iterator[Path]:
    """Every Python file of the repository."""
    for folder in ("attnfuse", "passes", "scripts", "tests"):
        yield from _python_files(ROOT / folder)


def _python_files(folder: Path) -> Iterator[Path]:
    link = ROOT / "attnfuse" / "passes"
    return (path for path in folder.rglob("*.py") if link not in path.parents)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, with ``from a import b`` as ``a`` and ``a.b``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
