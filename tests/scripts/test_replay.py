"""The replay prints what is made of a model, and finds what another installation or commit makes of it instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/replay.py"), "--only", "vit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def interpreter(folder: Path, through: str) -> str:
    """A Python whose output goes through a command, as another installation's would be other text."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\n"{sys.executable}" "$@" | {through}\n')
    script.chmod(0o755)
    return str(script)


def test_every_site_is_printed() -> None:
    done = replay()
    assert done.returncode == 0, done.stderr
    head, *sites = done.stdout.splitlines()
    assert head == "vit: no mask at all"
    assert [line.partition(":")[0].strip() for line in sites[::2]] == ["site 1", "site 2"]
    assert all('"score": "0.3535533905932738 * s"' in line for line in sites[1::2])


def test_another_installation_is_compared_with(tmp_path: Path) -> None:
    done = replay("--with-python", interpreter(tmp_path, through="sed s/scale/softcap/"))
    assert done.returncode == 1, done.stderr
    changed = [line for line in done.stdout.splitlines() if line[:1] in "+-" and line[1:2] == " "]
    assert len(changed) == 4
    assert all(("softcap" in line) == (line[0] == "-") for line in changed)


def test_another_commit_is_compared_with_and_cleaned_up_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this checkout has no history")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = replay("--against", "HEAD")
    # 1 where the working tree changes what is made of the model
    assert done.returncode in (0, 1), done.stderr
    assert not list(tmp_path.rglob("there"))


def test_an_unknown_commit_is_one_sentence() -> None:
    done = replay("--against", "no-such-commit")
    assert done.returncode == 2
    assert "is no commit here" in done.stderr
    assert "Traceback" not in done.stderr
