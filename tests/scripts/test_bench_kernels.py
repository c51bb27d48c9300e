"""The benchmark of kernels alone: its problems, whom it asks, and what it says of made-up figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnfuse.form import form_of
from attnfuse.kernels.triton import kernel as triton_kernel
from attnfuse.target import Target

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark import kernels

    return kernels


def test_rows_are_chosen_by_name_length_and_width(alone: Any) -> None:
    assert len(alone.kernel_cases((), (), ())) == len(alone.PROBLEMS) * len(alone.LENGTHS) * len(alone.WIDTHS)
    found = alone.kernel_cases(("causal", "bias"), (16384,), (64, 256))
    assert list(map(str, found)) == [f"{name} N=16384 D={width}" for name in ("causal", "bias") for width in (64, 256)]


def test_every_score_has_a_form(alone: Any) -> None:
    """Whose mask is then read: a program without one skips no tile."""
    forms = {name: form_of(alone.KernelCase(name, 512, 64).spec.score) for name in alone.PROBLEMS}
    assert all(forms.values())
    assert {name for name, form in forms.items() if form.keep} == {"causal", "window", "softcap", "alibi"}
    assert forms["softcap"].softcap == 50.0
    assert forms["bias"].bias


def test_the_window_is_a_quarter_of_the_keys(alone: Any) -> None:
    assert "n >= m - 127" in str(alone.PROBLEMS["window"].score.format(scale=1.0, window=512 // 4 - 1))
    assert "127" in alone.KernelCase("window", 512, 64).spec.to_text()


def test_shapes_make_up_the_tokens(alone: Any) -> None:
    assert alone.KernelCase("causal", 1024, 64).shapes == [(8, 32, 1024, 64), (8, 8, 1024, 64), (8, 8, 1024, 64)]
    assert alone.KernelCase("bias", 16384, 64).shapes[3] == (1, 32, 16384, 16384)
    assert alone.KernelCase("alibi", 512, 64).shapes[3] == (1, 32, 1, 1)


def test_kernels_that_do_not_refuse_are_asked(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "_installed", tuple)
    hopper, ampere = Target.parse("cuda:sm90"), Target.parse("cuda:sm80")
    plain, bias = alone.KernelCase("plain", 512, 64), alone.KernelCase("bias", 512, 64)
    assert set(plain.kernels(hopper, training=True)) == {"gluon", "cudnn", "triton"}
    assert set(plain.kernels(ampere, training=True)) == {"cudnn", "triton"}
    assert set(bias.kernels(hopper, training=False)) == {"gluon", "triton"}
    # slopes are constants, a bias is learned
    assert [x.requires_grad for x in bias.problem(training=True).captures] == [True]
    assert [x.requires_grad for x in alone.KernelCase("alibi", 512, 64).problem(training=True).captures] == [False]


def test_a_row_has_each_kernels_steps_and_the_reasons_of_others(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine's CPU, a call standing for its graph."""

    def randn(*shape: int, device: str, **options: Any) -> torch.Tensor:
        return drawn(*shape, **options)

    def timed(calls: dict[str, Any]) -> dict[str, float]:
        called.extend(call() for call in calls.values())
        return dict.fromkeys(calls, 1.0)

    def fails(*_: object) -> None:
        raise RuntimeError("no room")

    called: list[Any] = []
    drawn = torch.randn
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "rand", lambda shape, device: drawn(shape))
    monkeypatch.setattr(alone, "TOKENS", 64)
    monkeypatch.setattr(alone, "all_graphed", lambda calls, absent: calls)
    monkeypatch.setattr(alone, "interleaved", timed)
    monkeypatch.setattr(alone, "give_back", lambda: None)
    monkeypatch.setattr(type(alone.lookup("direct")), "run", fails)
    (row,) = alone.measure_kernels(alone.kernel_cases(("bias",), (64,), (16,)))
    assert row.milliseconds["blocked"] == {"forward": 1.0, "backward": 1.0}
    assert row.absent == {"direct": "RuntimeError: no room"}
    shapes = [[tuple(x.shape) for x in each] for each in called if isinstance(each, tuple)]
    # a learned bias has its gradient too
    assert shapes[0] == alone.KernelCase("bias", 64, 16).shapes


def test_times_are_told_by_kernel_and_step(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    times = alone._by_kernel({"gluon forward": 0.0842, "gluon backward": 0.3, "triton forward": 0.1})
    assert times == {"gluon": {"forward": 0.0842, "backward": 0.3}, "triton": {"forward": 0.1}}
    rows = [
        alone.KernelRow(alone.KernelCase("alibi", 512, 64), times, {"triton backward": "OutOfMemoryError"}),
        alone.KernelRow(alone.KernelCase("plain", 512, 64), {"cudnn": {"forward": 0.2, "backward": 0.4}}),
    ]
    said = "alibi N=512 D=64: gluon 0.084 0.300; triton 0.100 - (milliseconds, forward and backward)"
    assert alone.as_line(rows[0]) == said
    columns = {column.header: list(column.cells) for column in alone.as_table(rows).columns}
    assert columns["triton"] == ["0.100 -", "- -"]
    assert columns["cudnn"] == ["- -", "0.200 0.400"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(("--only", "llama"), "no problem is called 'llama'"), ((), "kernels are measured alone on a GPU")],
)
def test_a_wrong_argument_is_one_sentence(arguments: tuple[str, ...], complaint: str) -> None:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert complaint in " ".join(done.stderr.replace("│", " ").split())
