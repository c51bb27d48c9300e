"""Writing: a file is replaced as a whole or not touched, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

from attnfuse.atomic import _Steady, replacing
from attnfuse.errors import BadInput
from attnfuse.pt2 import load, save

OLD = b"what was here before"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file that is there already, alone in its folder."""
    path = tmp_path / "out.pt2"
    path.write_bytes(OLD)
    return path


def assert_untouched(place: Path) -> None:
    assert place.read_bytes() == OLD
    assert list(place.parent.iterdir()) == [place]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond ``size`` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_good_write_replaces(place: Path, program: ExportedProgram) -> None:
    save(program, place, {})
    assert list(place.parent.iterdir()) == [place]
    load(place)


def test_a_link_is_followed(place: Path, program: ExportedProgram, tmp_path: Path) -> None:
    link = tmp_path / "link.pt2"
    link.symlink_to(place)
    save(program, link, {})
    assert link.is_symlink()
    load(place)


def test_a_new_file_has_the_usual_permissions(tmp_path: Path, program: ExportedProgram) -> None:
    save(program, tmp_path / "new.pt2", {})
    (tmp_path / "other").touch()
    assert (tmp_path / "new.pt2").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_disk_that_fills_up(place: Path, program: ExportedProgram) -> None:
    """torch's writer alone ends the process here: an exception out of its callback is not caught."""
    with files_limited_to(2000), pytest.raises(BadInput, match=f"cannot write .*{os.strerror(errno.EFBIG)}"):
        save(program, place, {})
    assert_untouched(place)


def test_a_full_device() -> None:
    with _Steady("/dev/full", "wb") as stream:
        assert stream.write(b"x" * 10) == 10
        assert stream.failure is not None
        assert stream.failure.errno == errno.ENOSPC


def test_a_program_that_cannot_be_saved(place: Path) -> None:
    with pytest.raises(TypeError):
        save(torch.nn.Linear(1, 1), place, {})
    assert_untouched(place)


def test_an_error_in_the_middle(place: Path) -> None:
    def write() -> None:
        with replacing(place) as stream:
            stream.write(b"half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert_untouched(place)


def test_ctrl_c_in_the_middle(place: Path) -> None:
    reached = []

    def write() -> None:
        with replacing(place) as stream:
            signal.raise_signal(signal.SIGINT)
            stream.write(b"the rest")
            reached.append("the end of the block")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert reached, "the interrupt is held until torch's writer is done"
    assert_untouched(place)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("ask", [lambda folder: folder / "missing" / "out.pt2", lambda folder: folder])
def test_a_place_that_cannot_be_written(ask: Callable[[Path], Path], tmp_path: Path, program: ExportedProgram) -> None:
    with pytest.raises(BadInput, match="cannot write"):
        save(program, ask(tmp_path), {})
    assert not list(tmp_path.iterdir())
