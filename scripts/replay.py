"""What attnfuse makes of a set of models, as text, and how that differs from another commit or another installation.

A library that respells its attention, or a torch that traces it otherwise, shows as a difference here before it shows
as a model that runs slower::

    python scripts/replay.py > today.txt
    python scripts/replay.py --against v0.1.0                        # another commit, same packages
    python scripts/replay.py --with-python ~/torch211/bin/python     # same commit, other packages
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent

_GIT = ("git", "-C", str(ROOT))

Names = Annotated[str, typer.Option(help="models, with commas between; all of tests/models when left out")]
Revision = Annotated[str, typer.Option(help="a commit to compare with")]
Python = Annotated[str, typer.Option("--with-python", help="an interpreter of another installation to compare with")]


def replay(only: Names = "", against: Revision = "", python: Python = "") -> None:
    """Print the text, or its difference from another commit's or installation's; exit with 1 when there is one."""
    if not against and not python:
        sys.stdout.writelines(f"{line}\n" for line in lines(only))
        return
    if against and not _is_commit(against):
        raise typer.BadParameter(f"{against!r} is no commit here")
    there = _elsewhere(only, against, python or sys.executable)
    here = list(lines(only))
    found = list(difflib.unified_diff(there, here, against or python, "here", lineterm="", n=1))
    sys.stdout.writelines(f"{line}\n" for line in found)
    raise typer.Exit(1 if found else 0)


def lines(only: str) -> Iterator[str]:
    """The sites of each model, in graph order: kernel, features and spec of a fused one, the reason of another."""
    # imported here, since a comparison only starts processes and needs none of it in its own
    import torch  # noqa: PLC0415

    from attnfuse import Fused, explain  # noqa: PLC0415
    from tests.models.zoo import ZOO  # noqa: PLC0415

    wanted = [name for name in only.split(",") if name]
    for model in ZOO:
        if wanted and model.name not in wanted:
            continue
        yield f"{model.name}: {model.what}"
        with torch.no_grad():
            module = model.make(torch.float32)
            report = explain(module, **model.feed(model.paddings[-1]), options={"profit": False})
        # numbered, since the names of nodes change with every release of everything
        for number, site in enumerate(report.sites, start=1):
            what = f"{site.kernel}, {site.what}, {site.shape}" if isinstance(site, Fused) else f"refused, {site.reason}"
            yield f"  site {number}: {what}"
            if isinstance(site, Fused):
                yield f"    {site.spec}"


def _is_commit(revision: str) -> bool:
    command = [*_GIT, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _elsewhere(only: str, revision: str, python: str) -> list[str]:
    """The lines that this script prints for another commit, or with another interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        return _printed(_checked_out(revision, Path(folder)) if revision else ROOT, only, python)


def _checked_out(revision: str, folder: Path) -> Path:
    """The files of a commit, by an index of their own: nothing in the repository is changed, or waited for."""
    root = folder / "there"
    own = {**os.environ, "GIT_INDEX_FILE": str(folder / "index")}
    subprocess.run([*_GIT, "read-tree", revision], env=own, check=True)
    subprocess.run([*_GIT, "checkout-index", "--all", f"--prefix={root}/"], env=own, check=True)
    return root


def _printed(root: Path, only: str, python: str) -> list[str]:
    # the script of here, so that a commit from before it can be compared with too
    command = [python, str(Path(__file__).resolve()), "--only", only]
    environment = {**os.environ, "PYTHONPATH": str(root), "ATTNFUSE_CALIBRATE": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise typer.Exit(2)
    return done.stdout.splitlines()


if __name__ == "__main__":
    os.environ.setdefault("ATTNFUSE_CALIBRATE", "0")
    # whatever PYTHONPATH names comes before the folder of this script's own checkout
    sys.path.append(str(ROOT))
    typer.run(replay)
