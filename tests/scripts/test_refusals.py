"""The page of just refusals, and that no other refusal goes unnoticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from attnfuse import Report
from attnfuse.errors import Refused
from tests.unit.test_report import fused

ROOT = Path(__file__).parents[2]


def page(folder: Path, **reports: Report) -> subprocess.CompletedProcess[str]:
    files = [folder / f"{name}.json" for name in reports]
    for file, report in zip(files, reports.values(), strict=True):
        file.write_text(report.to_json())
    command = [sys.executable, str(ROOT / "scripts/refusals.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_just_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    lonely = Refused("there is a single key, whose weight is 1", "softmax")
    recurrent = Refused("the attention weights are also used by sum_4", "softmax_1")
    done = page(tmp_path, dia=Report((lonely, lonely, fused("a"))), pvt=Report((lonely,)), vits=Report((recurrent,)))
    assert done.returncode == 0, done.stderr
    assert "In 3 models 1 sites are fused and 4 refused" in done.stdout
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("| 3 | there is a single key, whose weight is 1 | a softmax over one key")
    assert first.endswith("| dia, pvt |")
    assert second.startswith("| 1 | the attention weights are also used by sum |")


def test_another_refusal_is_named_and_fails(tmp_path: Path) -> None:
    done = page(tmp_path, mine=Report((Refused("an operator that nobody knows", "softmax"),)))
    assert done.returncode == 1
    assert done.stderr == "not known to be just: an operator that nobody knows (mine)\n"
