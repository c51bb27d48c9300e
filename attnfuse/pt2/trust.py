"""What loading a ``.pt2`` would execute, found without loading it.

``torch.export.load`` runs code that the file brings along, in more places than its pickles:

* pickles: sample inputs, tensors of a subclass, opaque constants. :func:`only_tensors` holds the ones
  that go through ``torch.load`` to torch's weights-only unpickler; the others are refused by name;
* shared libraries of an AOTInductor package;
* sizes in ``models/*.json``, which ``sympy.sympify`` evaluates as Python;
* guards there, which are compiled and executed when the program is;
* argument trees there, which may name a module to import.

Each reader here accepts a small grammar that ordinary files stay within, and names what falls outside.
Operator names need none: torch's own verifier admits operators only.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_sympy

__all__ = ["only_tensors", "threat"]

#: Records that run code whatever they hold, and what they are.
_RUNNABLE = {
    "data/constants/opaque_obj_": "a pickled constant",
    "data/constants/custom_obj_": "a pickled script object",
    "data/aotinductor/": "a compiled library",
}
_PROGRAM = re.compile(r"(models/.*|serialized_exported_program\.json)")

_PLAIN_STRING = re.compile(r"\w*|[-+]?\d*\.?\d+(e[-+]?\d+)?")
_GUARD_METHODS = {"size", "stride", "storage_offset", "dim", "numel", "sqrt", "ceil", "floor", "trunc", "isnan"}
_GUARD_FUNCTIONS = {"abs", "float", "int", "len", "max", "min", "round", "cast_symbool_to_symint_guardless"}
_GUARD_CONSTANTS = {"inf", "nan", "pi"}

_EXPRESSION = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Constant, ast.Name,
    ast.Tuple, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_GUARD = (*_EXPRESSION, ast.Subscript, ast.Attribute)


@contextmanager
def only_tensors() -> Iterator[None]:
    """Within it ``torch.load`` refuses, wherever it is called from, all that is not tensors and plain containers."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def threat(archive: zipfile.ZipFile) -> str | None:
    """What in ``archive`` would run code when loaded under :func:`only_tensors`, in words; None when nothing would.

    Raises ValueError when a program in it is not JSON.
    """
    for member in archive.namelist():
        record = member.partition("/")[2] or member
        for prefix, what in _RUNNABLE.items():
            if record.startswith(prefix):
                return f"{what} ({record})"
        if _PROGRAM.fullmatch(record):
            found = next(_threats(json.loads(archive.read(member))), None)
            if found is not None:
                return f"{found} ({record})"
    return None


def _threats(part: Any) -> Iterator[str]:
    """Every threat in a part of a program's JSON, depth first."""
    if isinstance(part, list):
        for item in part:
            yield from _threats(item)
    if isinstance(part, dict):
        for key, item in part.items():
            yield from _threats_of(key, item)
            yield from _threats(item)


def _threats_of(key: str, item: Any) -> Iterator[str]:
    match key, item:
        case "expr_str", str() if not _is_size(item):
            yield f"a size that is no arithmetic, {item[:60]!r}"
        case "guards_code", list():
            yield from (f"a guard that is no comparison, {code[:60]!r}" for code in item if not _is_guard(code))
        case "in_spec" | "out_spec", str() if item and not _is_plain_tree(json.loads(item)):
            yield f"an argument tree that imports code, {item[:60]!r}"


def _is_size(code: str) -> bool:
    """Whether ``code`` calls nothing but classes of symbolic expressions."""
    return all(
        isinstance(part, _EXPRESSION) and (not isinstance(part, ast.Call) or _is_symbolic(part.func)) and _is_mild(part)
        for part in _parts(code)
    )


def _is_symbolic(function: ast.expr) -> bool:
    if not isinstance(function, ast.Name):
        return False
    found = getattr(torch_sympy, function.id, None) or getattr(sympy, function.id, None)
    return isinstance(found, type) and issubclass(found, sympy.Basic)


def _is_guard(code: str) -> bool:
    """Whether ``code`` compares sizes and constants, calling nothing but arithmetic."""
    return all(
        isinstance(part, _GUARD) and (not isinstance(part, ast.Call) or _is_arithmetic(part.func)) and _is_mild(part)
        for part in _parts(code)
    )


def _is_arithmetic(function: ast.expr) -> bool:
    match function:
        case ast.Name(id=name):
            return name in _GUARD_FUNCTIONS
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name.startswith(("sym_", "_sym_"))
    return isinstance(function, ast.Attribute)


def _is_mild(part: ast.AST) -> bool:
    match part:
        case ast.Constant(value=str() as value):
            return _PLAIN_STRING.fullmatch(value) is not None
        case ast.Attribute(attr=name):
            return name in _GUARD_METHODS | _GUARD_CONSTANTS or name.startswith(("sym_", "_sym_"))
    return True


def _parts(code: str) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(code, mode="eval"))
    except SyntaxError:
        yield ast.Pass()  # which no grammar here accepts


def _is_plain_tree(tree: Any) -> bool:
    """Whether an argument tree, with the JSON texts nested in it, names no module to import."""
    match tree:
        case dict():
            return not tree.keys() & {"__enum__", "default_factory_module"} and all(map(_is_plain_tree, tree.values()))
        case list():
            return all(map(_is_plain_tree, tree))
        case str() if tree.startswith(("{", "[")):
            return _is_plain_tree(json.loads(tree))
    return True
