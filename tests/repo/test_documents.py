"""README and CONTRIBUTING say what is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from attnfuse.commands import app
from attnfuse.exits import EXITS
from attnfuse.fuse import STAGES
from attnfuse.kernels import kernels
from attnfuse.options import Options
from tests.repo.sources import ROOT

README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
COMMANDS = typer.main.get_command(app).commands


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def test_the_two_commands() -> None:
    lines = "".join(blocks(README, "sh")).splitlines()
    assert "pip install -c constraints.txt -e . && attnfuse demo" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines


def test_continuous_integration_runs_the_second_as_written() -> None:
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [line for line in "".join(blocks(README, "sh")).splitlines() if "attnfuse " in line])
def test_commands_and_options_exist(line: str) -> None:
    _, _, command = line.rpartition("&& ")
    program, name, *arguments = shlex.split(command)
    assert program == "attnfuse"
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_exit_codes() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", README, flags=re.MULTILINE))
    assert rows == {str(end.code): end.meaning for end in EXITS}


def test_options() -> None:
    described = _first_column("option")
    # portable is what --custom-op turns off
    assert described == {name for name in Options.__dataclass_fields__ if name != "portable"}


def test_kernels() -> None:
    assert _first_column("kernel") == set(kernels())


def _first_column(heading: str) -> set[str]:
    """The names in the first column of the README's table with that heading."""
    table = README.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))


def test_every_stage_is_explained() -> None:
    explained = re.findall(r"^\| (\w+) \| ", CONTRIBUTING, flags=re.MULTILINE)
    assert [stage.name for stage in STAGES] == [name for name in explained if name not in ("stage", "capture")]


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:attnfuse|passes|tests|scripts)/[\w/.]+)`", CONTRIBUTING)))
)
def test_paths_exist(path: str) -> None:
    assert (ROOT / Path(path)).exists()


def test_python_blocks_are_python() -> None:
    for block in blocks(README, "python"):
        compile(block, "README.md", "exec")


def test_the_kernel_that_is_added_is_the_tests_package() -> None:
    package = ROOT / "tests" / "kernels" / "example_package"
    assert (package / "attnfuse_example.py").read_text() in blocks(README, "python")
    assert blocks(README, "toml") == [(package / "pyproject.toml").read_text()]
