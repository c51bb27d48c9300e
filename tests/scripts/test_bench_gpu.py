"""The GPU benchmark's rows and verdicts, from made-up figures; and what it says where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark import gpu

    return gpu


def row(gpu: Any, name: str, *, training: bool = False, **milliseconds: float) -> Any:
    return gpu.GpuRow(gpu.GpuCase(name, 4096, "bf16", training), milliseconds, "triton")


def test_every_variant_is_measured_forward_and_backward_but_decoding(gpu: Any) -> None:
    found = gpu.gpu_cases((), ())
    assert {case.name for case in found if case.training} == {case.name for case in found} - {"decode"}
    assert [case.length for case in found if case.name == "decode"] == list(gpu.DECODED)


def test_verdicts(gpu: Any) -> None:
    rows = [
        row(gpu, "llama", inductor=4.0, attnfuse=0.5, eager=13.0),
        row(gpu, "sinks", inductor=6.0, attnfuse=0.6),
        row(gpu, "softcap", inductor=3.0, attnfuse=1.0),
        row(gpu, "bias", training=True, inductor=8.0, attnfuse=10.0),
    ]
    verdicts = {(target.claim, target.where): (target.value, target.met) for target in gpu.targets(rows)}
    assert verdicts["time / best peer, worst row", "bias N=4096 bf16 training"] == (1.25, False)
    assert verdicts["speed-up over Inductor", "llama"] == (8.0, True)
    assert verdicts["speed-up over Inductor", "softcap"] == (3.0, False)
    assert verdicts["sinks / causal", ""] == (1.2, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
