"""The bodies in Triton's interpreter, which is switched on before Triton is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

from tests.repo.sources import ROOT

CASES = ("interpreted.py", "interpreted_float8.py", "interpreted_tiles.py", "interpreted_weights.py")


def _why_not() -> str:
    """Why Triton's interpreter does not run here; empty where it does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    import numpy  # noqa: ICN001
    import triton

    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        # it makes an int of an array of one element, which numpy 2.4 forbids
        return f"the interpreter of Triton {triton.__version__} needs numpy before 2.4, not {numpy.__version__}"
    return ""


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        *(str(Path(__file__).parent / name) for name in CASES),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
