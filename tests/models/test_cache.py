"""Compiled code outlives the process, and the second process still gets the right gradients."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.gradients import assert_all_as_good, exact_gradients, gradients
from tests.models.second_process import Outcome
from tests.models.zoo import MODELS

ROOT = Path(__file__).parents[2]


def in_a_process(name: str, padding: str, folder: Path) -> Outcome:
    path = folder / "outcome.pt"
    command = [sys.executable, "-m", "tests.models.second_process", name, padding, str(path)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=True)
    return Outcome.load(path)


@pytest.mark.slow
def test_a_second_process_finds_the_code_and_the_gradients(tmp_path: Path, model_of: Callable[..., nn.Module]) -> None:
    first, second = (in_a_process("gpt2", "left", tmp_path) for _ in range(2))
    assert (first.hits, second.misses) == (0, 0)
    assert second.hits == first.misses > 0
    module, inputs = copy.deepcopy(model_of("gpt2", torch.float32)).train(), MODELS["gpt2"].feed("left")
    assert_all_as_good(second.gradients, gradients(module, inputs), exact_gradients(module, inputs))
