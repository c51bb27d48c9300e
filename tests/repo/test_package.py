"""``passes/`` is ``attnfuse.passes`` and nothing else, and the build knows every package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.sources import ROOT, everything, imports, modules

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib; 3.11 and later check this")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_the_folders(project: dict) -> None:
    folders = {name for name, path in modules() if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_every_folder_with_code_is_a_package() -> None:
    bare = {path.parent for _, path in modules() if not (path.parent / "__init__.py").exists()}
    assert not bare


def test_the_symlink_is_relative() -> None:
    link = ROOT / "attnfuse" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_bare_passes_cannot_be_imported() -> None:
    done = _python("import passes")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "attnfuse.passes" in done.stderr


def test_passes_is_imported_under_its_name() -> None:
    assert _python("import attnfuse.passes").returncode == 0


def test_nobody_imports_bare_passes() -> None:
    guilty = [path for path in everything() for name in imports(path) if name.partition(".")[0] == "passes"]
    assert not guilty


def test_every_requirement_is_pinned(project: dict) -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    table = project["project"]
    wanted = [*table["dependencies"], *(name for extra in table["optional-dependencies"].values() for name in extra)]
    assert {requirement.partition(">=")[0].lower().replace("-", "_") for requirement in wanted} <= {
        name.replace("-", "_") for name in pinned
    }


def test_entry_points_exist(project: dict) -> None:
    table = project["project"]
    targets = [*table["scripts"].values(), *table["entry-points"]["torch_dynamo_backends"].values()]
    for target in targets:
        module, _, name = target.partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
