"""A small exported program, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.export import Dim, ExportedProgram

from attnfuse.cli import run
from tests.cli.models import Cached


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``command("rewrite", path, ...)`` runs it in this process, its output not a terminal."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def program() -> ExportedProgram:
    """Attention with a cache that it writes into and a length that is free from 2 to 64."""
    torch.manual_seed(0)
    inputs = (torch.randn(2, 24, 16),)
    return torch.export.export(Cached().eval(), inputs, dynamic_shapes=({1: Dim.AUTO(min=2, max=64)},))


@pytest.fixture(scope="session")
def archive(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``program`` as torch writes it."""
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    torch.export.save(program, path)
    return path
