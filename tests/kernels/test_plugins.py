"""Kernels of other packages: the example that the README shows, and packages that are broken."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attnfuse import fuse_graph
from attnfuse.kernels import Kernel, Problem, choice, choose, digest, kernel, kernels, registry
from attnfuse.op import attention
from attnfuse.target import Target
from tests.kernels.cases import SIZES, SPECS, assert_as_exact, case, exact, written_out
from tests.kernels.installing import EXAMPLE, install
from tests.kernels.test_registry import problem

CPU = Target("cpu")
MODULE = (EXAMPLE / "attnfuse_example.py").read_text()
ENTRY = re.findall(r'^example = "(.*)"$', (EXAMPLE / "pyproject.toml").read_text(), flags=re.MULTILINE)[0]

Install = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package for this test; afterwards its kernels are gone."""
    before = set(registry._KERNELS)
    modules = set(sys.modules)

    def put(name: str, module: str, entry: str, version: str = "1.0") -> None:
        install(tmp_path, name, module, entry, version)
        monkeypatch.syspath_prepend(tmp_path)
        registry._load_entry_points.cache_clear()

    yield put
    for name in set(registry._KERNELS) - before:
        registry._KERNELS.pop(name)
    registry._PACKAGES.clear()
    for name in {"attnfuse_example", "broken"} - modules:
        sys.modules.pop(name, None)
    registry._load_entry_points.cache_clear()
    choice._warn.cache_clear()


class TestTheExample:
    @pytest.fixture(autouse=True)
    def _example(self, installed: Install) -> None:
        installed("attnfuse-example", MODULE, ENTRY)

    def test_it_is_chosen_for_what_it_does_not_refuse(self) -> None:
        assert choose(problem("scaled"), CPU).kernel == "head_by_head"
        refused = {c.name: c.reasons for c in choose(problem("causal"), CPU).candidates}["head_by_head"]
        assert refused == ("computes a softmax of scaled scores and nothing else",)

    @pytest.mark.parametrize("sizes", ["odd", "grouped heads", "one row"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_what_it_is_asked(self, sizes: str, dtype: torch.dtype) -> None:
        kernels()
        given = case(SPECS["scaled"], SIZES[sizes], dtype)
        out, _ = attention(given.query, given.key, given.value, [], [], given.spec.to_text(), "head_by_head")
        assert_as_exact([out], [written_out(given)], [exact(given)])

    def test_it_is_fused_into_a_graph(self) -> None:
        query = torch.randn(1, 8, 512, 64)
        fused: list[torch.fx.GraphModule] = []

        def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            fused.append(fuse_graph(gm, inputs))
            return fused[0]

        def written(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x @ x.mT * 0.125, dim=-1) @ x

        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(written, backend=backend)(query), written(query))
        assert [site.kernel for site in fused[0].meta["attnfuse_report"].fused] == ["head_by_head"]


def test_the_cache_key_knows_package_and_version(installed: Install, tmp_path: Path) -> None:
    without = digest()
    installed("attnfuse-example", MODULE, ENTRY)
    one = digest()
    (tmp_path / "attnfuse_example-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: attnfuse-example\nVersion: 1.1\n"
    )
    registry._KERNELS.pop("head_by_head")
    sys.modules.pop("attnfuse_example")
    registry._load_entry_points.cache_clear()
    assert len({without, one, digest()}) == 3


def test_the_command_lists_it_in_a_fresh_process(tmp_path: Path) -> None:
    install(tmp_path, "attnfuse-example", MODULE, ENTRY)
    install(tmp_path, "broken", "1 / 0", "broken")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}
    command = [sys.executable, "-m", "attnfuse", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    assert "head_by_head\tcpu\tOne query head at a time" in done.stdout
    # one line for the package that cannot be loaded
    assert [line for line in done.stderr.splitlines() if "broken 1.0" in line] == done.stderr.splitlines()


# --- packages that are broken -----------------------------------------------------------------------

CLASS = """
from attnfuse import Kernel
class Broken(Kernel):
    {body}
"""
BROKEN = {
    "does not import": ("import nobody_wrote_this", "broken", "ModuleNotFoundError"),
    "is no Python": ("def", "broken", "SyntaxError"),
    "fails": ("1 / 0", "broken", "ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "broken", "SystemExit"),
    "names nothing": ("", "broken:Kernel", "AttributeError"),
    "names no kernel": ("KERNEL = 3", "broken:KERNEL", "neither a module nor a subclass"),
    "is abstract": (CLASS.format(body="name = 'broken'"), "broken:Broken", "abstract"),
    "has no name": (CLASS.format(body="devices = ('cpu',)"), "broken:Broken", "name"),
    "takes a name": (CLASS.format(body="name = 'blocked'"), "broken:Broken", "already is a kernel called 'blocked'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_package_that_cannot_be_loaded_is_left_out(
    how: str, installed: Install, caplog: pytest.LogCaptureFixture
) -> None:
    before, chosen = list(kernels()), choose(problem(), CPU).kernel
    module, entry, words = BROKEN[how]
    installed("broken", module, entry, "0.1")
    with caplog.at_level(logging.WARNING, "attnfuse"):
        assert list(kernels()) == before
        assert choose(problem(), CPU).kernel == chosen
    (record,) = caplog.records
    assert "kernels of broken 0.1 are left out" in record.message
    assert words in record.message


class Failing(Kernel):
    """Somebody else's kernel, which fails when it is asked."""

    name = "failing"
    devices = ("cpu",)

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        return ()

    def cost(self, problem: Problem, target: Target) -> float:
        return 1e-12

    def run(self, *operands: object) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("refuses", lambda *_: 1 / 0, "ZeroDivisionError"),
        ("refuses", lambda *_: "has no dropout", "returns a tuple of sentences"),
        ("cost", lambda *_: float("nan"), "cost() returns seconds, not nan"),
        ("cost", lambda *_: None, "TypeError"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_kernel_that_fails_when_asked_is_no_candidate(
    method: str, answer: object, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel(Failing)
    assert choose(problem(), CPU).kernel == "failing"
    monkeypatch.setattr(Failing, method, answer)
    with caplog.at_level(logging.WARNING, "attnfuse"):
        chosen = [choose(problem(), CPU) for _ in range(2)]
    assert all(each.kernel != "failing" for each in chosen)
    (reason,) = {c.name: c.reasons for c in chosen[0].candidates}["failing"]
    assert words in reason
    assert "tests.kernels.test_plugins" in reason
    # once, though it was asked twice
    assert len(caplog.records) == 1
