"""The command line: exit codes, one-line errors, and outputs that stay untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnfuse import errors, pt2
from attnfuse.errors import BadInput, NotEquivalent
from attnfuse.exits import EXITS
from attnfuse.version import __version__
from tests.cli.conftest import Ended
from tests.cli.damage import DAMAGES, THREATS, pickled_inputs

Command = Callable[..., Ended]
OLD = b"what was here before"


def assert_refused(ended: Ended, code: int, words: str) -> None:
    """One line on the standard error, nothing on the standard output."""
    assert ended.code == code, ended
    assert ended.out == ""
    line = ended.err.lstrip("\n")  # after the terminal's ^C
    assert line.startswith("attnfuse: ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert words in ended.err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A result that is there already; afterwards the folder must hold it alone, unchanged, beside the input."""
    folder = tmp_path / "results"
    folder.mkdir()
    path = folder / "out.pt2"
    path.write_bytes(OLD)
    return path


def assert_untouched(out: Path) -> None:
    assert out.read_bytes() == OLD
    assert list(out.parent.iterdir()) == [out]


# --- what works -------------------------------------------------------------------------------------


def test_rewrite(command: Command, archive: Path, out: Path, tmp_path: Path) -> None:
    ended = command("rewrite", archive, "-o", out, "--report", tmp_path / "report.json", "--target", "cpu")
    assert ended.code == 0, ended
    assert ended.err == ""
    assert "attention sites: 1" in ended.out
    assert "verified on saved inputs, random inputs, random inputs of other sizes" in ended.out
    assert "\x1b" not in ended.out
    assert list(out.parent.iterdir()) == [out]
    notes = {"attnfuse.json": ""}
    back = torch.export.load(out, extra_files=notes)
    pt2.check(pt2.load(archive), back)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(notes["attnfuse.json"])
    assert report["attnfuse"] == __version__
    assert report["verification"]["inputs"]


def test_rewrite_again_is_harmless(command: Command, archive: Path, out: Path, tmp_path: Path) -> None:
    assert command("rewrite", archive, "-o", out).code == 0
    assert command("rewrite", out, "-o", tmp_path / "twice.pt2").code == 0


@pytest.mark.parametrize(
    "options", ["--custom-op", "--numerics fast", "--kernel sdpa", "--certify off", "--fp8-attention --custom-op"]
)
def test_options(options: tuple[str, ...], command: Command, archive: Path, out: Path) -> None:
    ended = command("rewrite", archive, "-o", out, *options.split())
    assert ended.code == 0, ended
    assert "verified on" in ended.out


def test_the_report_is_written_with_the_result_or_not(
    command: Command, archive: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BadInput("cannot write it")

    monkeypatch.setattr(pt2, "save", fail)
    assert_refused(command("rewrite", archive, "-o", out, "--report", tmp_path / "r.json"), 3, "cannot write it")
    assert_untouched(out)
    assert not (tmp_path / "r.json").exists()


def test_no_verify_says_so(command: Command, archive: Path, out: Path) -> None:
    assert "not verified: --no-verify was given" in command("rewrite", archive, "-o", out, "--no-verify").out


def test_print_after(command: Command, archive: Path, out: Path) -> None:
    ended = command("rewrite", archive, "-o", out, "--print-after", "lift")
    assert ended.code == 0
    assert "--- after lift" in ended.err


def test_explain(command: Command, archive: Path) -> None:
    ended = command("explain", archive)
    assert ended.code == 0
    assert "attention sites: 1" in ended.out
    sites = json.loads(command("explain", archive, "--json").out)["sites"]
    assert [site["node"] for site in sites]
    assert "models.py" in sites[0]["source"]


def test_kernels(command: Command, archive: Path) -> None:
    listed = command("kernels")
    assert listed.code == 0
    assert {"sdpa", "blocked"} <= {line.split("\t")[0] for line in listed.out.splitlines()}
    judged = command("kernels", "--target", "cpu", "--for", "where(n <= m, 0.125 * s, -inf)")
    assert judged.code == 0
    assert "scale 0.125, causal" in judged.out
    assert "unfused" in judged.out
    assert "scale 0.5, causal" in command("kernels", "--for", archive).out


def test_types_of_a_library(command: Command, out: Path, tmp_path: Path) -> None:
    """In processes of their own, because a type that is registered once stays so."""
    (tmp_path / "library.py").write_text(LIBRARY)
    make = f"import torch, library; torch.export.save(library.program, {str(tmp_path / 'in.pt2')!r})"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True, capture_output=True)
    refused = process("rewrite", tmp_path / "in.pt2", "-o", out)
    assert refused.returncode == 3
    assert "Pair in pytree is not registered; pass --import with the library that defines it" in refused.stderr
    assert_untouched(out)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}
    assert process("rewrite", tmp_path / "in.pt2", "-o", out, "--import", "library", env=environment).returncode == 0
    assert_refused(command("explain", out, "--import", "nobody_wrote_this"), 3, "cannot import nobody_wrote_this")


LIBRARY = """
from dataclasses import dataclass
import torch

@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor

class Pairing(torch.nn.Module):
    def forward(self, hidden):
        return Pair(hidden, hidden * 2)

torch.export.register_dataclass(Pair, serialized_type_name="library.Pair")
program = torch.export.export(Pairing(), (torch.ones(2),))
"""


def test_version_and_help(command: Command) -> None:
    assert __version__ in command("--version").out
    for name in ((), ("rewrite",), ("explain",), ("kernels",), ("tune",), ("demo",)):
        ended = command(*name, "--help")
        assert ended.code == 0
        assert ended.out.startswith("Usage: attnfuse")


# --- what does not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_inputs(name: str, command: Command, archive: Path, out: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(damage(archive.read_bytes()))
    assert_refused(command("rewrite", bad, "-o", out), 3, words)
    assert_untouched(out)
    assert_refused(command("explain", bad), 3, words)


@pytest.mark.parametrize("name", THREATS)
def test_threatening_inputs(
    name: str, command: Command, archive: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    threat, words = THREATS[name]
    bad, canary = tmp_path / "bad.pt2", tmp_path / "canary"
    bad.write_bytes(threat(archive.read_bytes(), str(canary)))
    assert_refused(command("rewrite", bad, "-o", out), 3, words)
    assert_untouched(out)
    assert not canary.exists()


def test_trusted_inputs_are_loaded(command: Command, archive: Path, out: Path, tmp_path: Path) -> None:
    bad, canary = tmp_path / "bad.pt2", tmp_path / "canary"
    bad.write_bytes(pickled_inputs(archive.read_bytes(), str(canary)))
    assert command("rewrite", bad, "-o", out, "--trust-input").code == 0
    assert canary.exists()


def test_missing_input(command: Command, out: Path, tmp_path: Path) -> None:
    assert_refused(command("rewrite", tmp_path / "no.pt2", "-o", out), 3, "No such file")
    assert_untouched(out)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--target", "tpu"), 3, "unknown target 'tpu'"),
        (("--kernel", "nobody"), 3, "no kernel 'nobody'"),
        (("--print-after", "lunch"), 3, "no stage 'lunch'"),
        (("--numerics", "wild"), 2, "'wild' is not one of"),
        (("--certify", "twice"), 2, "'twice' is not one of"),
        (("--speed",), 2, "No such option"),
        (("more",), 2, "unexpected extra argument"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], code: int, words: str, command: Command, archive: Path, out: Path
) -> None:
    assert_refused(command("rewrite", archive, "-o", out, *options), code, words)
    assert_untouched(out)


def test_usage(command: Command, archive: Path) -> None:
    assert_refused(command("rewrite", archive), 2, "Missing option '--output'")
    assert_refused(command("rewrote", archive), 2, "No such command 'rewrote'")
    assert_refused(command("kernels", "--for", "s + "), 3, "not an expression")
    assert_refused(command("kernels", "--for", "s", "--sizes", "1,2"), 3, "six sizes")
    assert_refused(command("kernels", "--for", "s", "--sizes", "1,3,2,8,8,8"), 3, "evenly")
    assert_refused(command("kernels", "--for", "exp(", "--target", "cpu"), 3, "not an expression")


def test_no_kernel(command: Command) -> None:
    ended = command("kernels", "--for", "s ** 0.5", "--target", "xpu:pvc")
    assert ended.code == 4
    assert "no kernel can compute this attention on xpu:pvc" in ended.err


def test_output_that_is_the_input(command: Command, archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    link = tmp_path / "link.pt2"
    link.symlink_to(archive)
    for output in (archive, archive.parent / "." / archive.name, link):
        assert_refused(command("rewrite", archive, "-o", output), 3, "is the input")
    assert_refused(command("rewrite", archive, "-o", tmp_path / "o.pt2", "--report", archive), 3, "is the input")
    assert_refused(command("rewrite", archive, "-o", tmp_path / "o", "--report", tmp_path / "o"), 3, "another output")
    assert archive.read_bytes() == before
    assert list(tmp_path.iterdir()) == [link]


def test_output_that_cannot_be_written(command: Command, archive: Path, tmp_path: Path) -> None:
    assert_refused(command("rewrite", archive, "-o", tmp_path), 3, "it is not an ordinary file")
    assert_refused(command("rewrite", archive, "-o", "/dev/null"), 3, "it is not an ordinary file")
    assert Path("/dev/null").is_char_device()
    assert_refused(command("rewrite", archive, "-o", tmp_path / "no" / "o.pt2"), 3, "is not a directory")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_it_does_not_verify(
    command: Command, archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotEquivalent("output 0 is off by 1")

    monkeypatch.setattr(pt2, "check", fail)
    assert_refused(command("rewrite", archive, "-o", out), 5, "output 0 is off by 1")
    assert_untouched(out)


@pytest.mark.parametrize("moment", ["load", "rewrite", "check", "save"])
def test_ctrl_c(moment: str, command: Command, archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT, at each step; while torch writes it is held until the writer is done."""
    owner, name = (torch.export, "save") if moment == "save" else (pt2, moment)
    step = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    # a job that a shell put into the background ignores it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert_refused(command("rewrite", archive, "-o", out), 130, "interrupted")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_untouched(out)


def test_a_bug_is_a_line_too(command: Command, archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(pt2, "rewrite", bug)
    assert_refused(
        command("rewrite", archive, "-o", out), 1, "internal error, please report it: ZeroDivisionError: two lines"
    )
    assert_untouched(out)
    monkeypatch.setenv("ATTNFUSE_TRACEBACK", "1")
    assert "Traceback" in command("rewrite", archive, "-o", out).err


def test_exit_codes_are_documented(command: Command) -> None:
    said = command("--help").out
    assert all(f"{end.code}  {end.meaning}" in said for end in EXITS)


def test_every_error_has_its_exit() -> None:
    kinds = {getattr(errors, name) for name in errors.__all__} - {errors.AttnfuseError}
    assert kinds <= {kind for end in EXITS for kind in end.errors}


# --- as a process -----------------------------------------------------------------------------------


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnfuse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)


def test_piped_output_is_plain(archive: Path, tmp_path: Path) -> None:
    done = process("rewrite", archive, "-o", tmp_path / "out.pt2")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_a_bad_file_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_text("no archive")
    done = process("explain", tmp_path / "bad.pt2")
    assert done.returncode == 3
    assert done.stderr == f"attnfuse: {tmp_path / 'bad.pt2'} is not a .pt2: not a zip archive\n"


def test_starting_imports_no_compilers_of_extensions() -> None:
    """They look for a CUDA toolkit, and log that there is one where there is no GPU."""
    code = "import sys, attnfuse.cli; print('torch.utils.cpp_extension' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_reader_that_leaves(archive: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "attnfuse", "explain", str(archive)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""
