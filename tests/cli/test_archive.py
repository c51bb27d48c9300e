"""Reading a .pt2: every bad one is a sentence, and none runs code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import constants

from attnfuse.errors import BadInput
from attnfuse.pt2 import load, save
from attnfuse.pt2.trust import _is_guard, _is_size
from tests.cli.damage import DAMAGES, THREATS
from tests.cli.models import Dropped


def test_an_ordinary_file_loads(archive: Path, program: ExportedProgram) -> None:
    loaded = load(archive)
    assert loaded.range_constraints.keys() == program.range_constraints.keys()
    hidden = torch.randn(2, 8, 16)
    torch.testing.assert_close(loaded.module()(hidden)[0], program.module()(hidden)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_sentence(name: str, archive: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    path = tmp_path / "bad.pt2"
    path.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(BadInput) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", THREATS)
def test_a_threat_is_refused_and_does_not_run(
    name: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    threat, words = THREATS[name]
    path, canary = tmp_path / "bad.pt2", tmp_path / "canary"
    path.write_bytes(threat(archive.read_bytes(), str(canary)))
    with pytest.raises(BadInput, match="would run code when loaded") as caught:
        load(path)
    assert words in str(caught.value)
    assert "--trust-input" in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("name", THREATS)
def test_the_threats_are_real(name: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trust each of them does run, on loading or on the first use: the refusals above refuse something."""
    if name == "pickled-constant" and not hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX"):
        pytest.skip("this torch has no opaque constants yet")
    monkeypatch.syspath_prepend(tmp_path)
    threat, _ = THREATS[name]
    path, canary = tmp_path / "bad.pt2", tmp_path / "canary"
    path.write_bytes(threat(archive.read_bytes(), str(canary)))
    # what is left of the program after the canary need not work
    with contextlib.suppress(Exception):
        load(path, trust_input=True).module()(torch.randn(2, 24, 16))
    assert canary.exists()


@pytest.mark.parametrize("path", ["missing.pt2", "."])
def test_no_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        load(tmp_path / path)


def test_loading_leaves_the_environment_alone(archive: Path) -> None:
    before = dict(os.environ)
    load(archive)
    assert dict(os.environ) == before


SIZES = ("Symbol('s27', positive=True, integer=True)", "Mul(Integer(8), Symbol('s0'))", "FloorDiv(Symbol('s0'), 2)",
         "s0*8 + 1", "Float('0.5', precision=53)", "-1")  # fmt: skip
NO_SIZES = ("__import__('os').system('true')", "open('x', 'w')", "Symbol('f(x)')", "(lambda: 1)()", "sympify('f()')",
            "lambdify(s0, 'g')", "s0.func('h')", "[1 for _ in '1']", "s0(")  # fmt: skip
GUARDS = ("L['x'].size()[1] == L['d']['a'][0].size()[1]", "2 <= L['x'].size()[0]", "L['n'] == -math.inf",
          "not math.isnan(L['n'])", "L['mode'] == 'fast'")  # fmt: skip
NO_GUARDS = ("open('x')", "torch.hub.os.system('x')", "L['x'].__class__", "L['x'].numpy() == 1", "L['a\"b'] == 1",
             "eval(L['x'])", "math.os.getcwd()")  # fmt: skip


@pytest.mark.parametrize("code", SIZES)
def test_sizes_that_torch_writes(code: str) -> None:
    assert _is_size(code)


@pytest.mark.parametrize("code", NO_SIZES)
def test_sizes_that_nobody_should_evaluate(code: str) -> None:
    assert not _is_size(code)


@pytest.mark.parametrize("code", GUARDS)
def test_guards_that_torch_writes(code: str) -> None:
    assert _is_guard(code)


@pytest.mark.parametrize("code", NO_GUARDS)
def test_guards_that_nobody_should_execute(code: str) -> None:
    assert not _is_guard(code)


def test_notes_travel_with_the_program(program: ExportedProgram, tmp_path: Path) -> None:
    save(program, tmp_path / "a.pt2", {"note.txt": "seen"})
    notes = {"note.txt": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=notes)
    assert notes == {"note.txt": "seen"}


@pytest.mark.parametrize("export", [Dropped])
def test_other_ordinary_programs_load(export: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    torch.export.save(torch.export.export(export(), (torch.randn(3),)), tmp_path / "b.pt2")
    load(tmp_path / "b.pt2")
