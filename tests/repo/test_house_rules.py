"""House rules that no linter holds: who imports what, and how long things are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.repo.sources import ROOT, imports, modules, tree

LONGEST_FILE, LONGEST_FUNCTION = 300, 40
MODULES = dict(modules())
BY_FILE = [pytest.param(path, id=name) for name, path in MODULES.items()]


def _in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_kernels_know_nothing_of_graphs() -> None:
    guilty = {n: m for n, p in MODULES.items() if _in(n, "attnfuse.kernels") for m in imports(p) if _in(m, "torch.fx")}
    assert not guilty


def test_only_kernels_import_triton() -> None:
    guilty = [n for n, p in MODULES.items() if not _in(n, "attnfuse.kernels") for m in imports(p) if _in(m, "triton")]
    assert not guilty


def test_score_programs_know_nothing_of_torch() -> None:
    for name in ("attnfuse.score", "attnfuse.spec", "attnfuse.form", "attnfuse.features"):
        assert not [module for module in imports(MODULES[name]) if _in(module, "torch")]


@pytest.mark.parametrize("path", BY_FILE)
def test_file(path: Path) -> None:
    """Says what it is, and is short."""
    assert ast.get_docstring(tree(path))
    # a body is read as one piece
    if not any(path.is_relative_to(ROOT / "attnfuse" / "kernels" / each) for each in ("triton", "gluon")):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", BY_FILE)
def test_functions_are_short(path: Path) -> None:
    functions = (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef) and not _is_kernel(node))
    long = {node.name: _body_lines(node) for node in functions if _body_lines(node) > LONGEST_FUNCTION}
    assert not long


def _is_kernel(function: ast.FunctionDef) -> bool:
    """The body of a kernel is one program, however long."""
    named = (each.func if isinstance(each, ast.Call) else each for each in function.decorator_list)
    return any(ast.unparse(decorator).endswith(".jit") for decorator in named)


def _body_lines(function: ast.FunctionDef) -> int:
    """Lines after the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", BY_FILE)
def test_public_names_have_docstrings(path: Path) -> None:
    definitions = (node for node in tree(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    public = [node for node in definitions if not node.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node) and not _is_plain_record(node)]


def _is_plain_record(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A dataclass of one field, whose name says what there is to say."""
    return isinstance(node, ast.ClassDef) and len(node.body) == 1 and isinstance(node.body[0], ast.AnnAssign)
