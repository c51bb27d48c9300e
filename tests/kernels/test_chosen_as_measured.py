"""The kernel that is chosen is the fastest of those whose forward and backward were timed alone on one H200."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnfuse.kernels import choose
from attnfuse.kernels.gpu import cudnn
from attnfuse.kernels.triton import kernel as triton_kernel
from attnfuse.target import Target

TREE = Path(__file__).parents[2]
HOPPER = Target.parse("cuda:sm90")
ROWS = json.loads((TREE / "attnfuse/kernels/gluon/measured/kernels.json").read_text())["rows"]
#: Two runs of one kernel differ by so much.
SLACK = 1.03


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's choice is asked for as if Triton were installed, as it will be there."""
    monkeypatch.setattr(triton_kernel, "_installed", tuple)
    # nor can torch say here what cuDNN takes there
    monkeypatch.setattr(cudnn, "WIDEST", 256)
    monkeypatch.syspath_prepend(str(TREE / "scripts"))


def seconds(steps: dict[str, float], *, training: bool) -> float:
    return steps["forward"] + (steps["backward"] if training else 0.0)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row["case"].values())))
def test_the_chosen_kernel_is_the_fastest(row: dict[str, Any], *, training: bool) -> None:
    from benchmark.kernels import KernelCase

    found = choose(KernelCase(**row["case"]).problem(training=training), HOPPER)
    times = {name: seconds(steps, training=training) for name, steps in row["milliseconds"].items()}
    assert set(times) <= set(found.seconds), "a kernel that was measured is refused"
    assert times[found.kernel] <= SLACK * min(times.values()), found.seconds


def test_no_kernel_is_always_the_fastest() -> None:
    """Else one that is always chosen would pass."""
    times = [
        {name: seconds(steps, training=training) for name, steps in row["milliseconds"].items()}
        for row in ROWS
        for training in (False, True)
    ]
    slow = {name for each in times for name in each if each[name] > SLACK * min(each.values())}
    assert slow == {"gluon", "cudnn", "triton"}
