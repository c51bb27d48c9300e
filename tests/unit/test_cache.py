"""Files that processes share: where they are, written together, and damaged."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from attnfuse import cache
from attnfuse.cache import Kept, folder
from attnfuse.errors import BadInput


def put(path: Path, **content: object) -> None:
    with Kept(path).changing() as kept:
        kept.update(content)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ATTNFUSE_CACHE", raising=False)
    assert folder() == tmp_path / "home" / ".cache" / "attnfuse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "attnfuse"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == tmp_path / "home" / ".cache" / "attnfuse"
    monkeypatch.setenv("ATTNFUSE_CACHE", str(tmp_path / "mine"))
    assert folder() == tmp_path / "mine"


def test_what_is_put_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.json"
    assert Kept(path).read() == {}
    put(path, a=1)
    put(path, b=[2.5])
    assert Kept(path).read() == {"a": 1, "b": [2.5]}


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    put(path, a=1)
    with pytest.raises(ZeroDivisionError), Kept(path).changing() as kept:
        kept["a"] = 1 / 0
    assert Kept(path).read() == {"a": 1}


WRITER = """
import sys
from pathlib import Path
from attnfuse.cache import Kept
for number in range(40):
    with Kept(Path(sys.argv[1])).changing() as kept:
        kept[f"{sys.argv[2]} {number}"] = "x" * 1000
    assert f"{sys.argv[2]} {number}" in Kept(Path(sys.argv[1])).read()
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], env=environment) for name in ("one", "two")
    ]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert not path.exists() or Kept(path).read()
        reads += path.exists()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert set(Kept(path).read()) == {f"{name} {number}" for name in ("one", "two") for number in range(40)}
    assert reads > 0
    assert {each.name for each in tmp_path.iterdir()} <= {"kept.json", "kept.json.lock"}


def damages(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    return {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "a digit changed": whole.replace(b"12345", b"12346"),
        "another file": b"\x89PNG\r\n\x1a\n\xff",
        "a list": b"[]",
        "without content": b'{"sha256": ""}',
        "content that is no object": json.dumps({"sha256": "", "content": 3}).encode(),
    }


@pytest.mark.parametrize("how", ["empty", "cut off", "a digit changed", "another file", "a list", "without content",
                                 "content that is no object"])  # fmt: skip
@pytest.mark.parametrize("by", ["a reader", "a writer"])
def test_a_damaged_file_is_set_aside(how: str, by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kept.json"
    put(path, a=12345)
    damaged = damages(path)[how]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "attnfuse"):
        if by == "a reader":
            assert Kept(path).read() == {}
        put(path, b=2)
    assert Kept(path).read() == {"b": 2}
    assert (tmp_path / "kept.damaged").read_bytes() == damaged
    (record,) = caplog.records
    assert f"{path} is damaged" in record.message


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("a file stands where the folder should be")
    path = tmp_path / "file" / "kept.json"
    with caplog.at_level(logging.WARNING, "attnfuse"):
        assert Kept(path).read() == {}
    assert f"cannot read {path}" in caplog.text
    with pytest.raises(BadInput, match="cannot write"):
        put(path, a=1)


def test_a_writer_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    path = tmp_path / "kept.json"
    put(path, a=1)
    with FileLock(f"{path}.lock"):
        assert Kept(path).read() == {"a": 1}
        with pytest.raises(BadInput, match="another process has held it"):
            put(path, a=2)
    assert Kept(path).read() == {"a": 1}
