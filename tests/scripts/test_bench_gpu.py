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


@pytest.fixture
def table(gpu: Any) -> Any:
    from benchmark import gpu_table

    return gpu_table


def row(gpu: Any, name: str, *, training: bool = False, length: int = 4096, **milliseconds: float) -> Any:
    figures = {peer.replace("_", " "): ms for peer, ms in milliseconds.items()}
    return gpu.GpuRow(gpu.GpuCase(name, length, "bf16", training), figures, "triton", dict.fromkeys(figures, 1e-3))


def test_every_variant_is_measured_forward_and_backward_but_what_has_no_gradient(gpu: Any) -> None:
    found = gpu.gpu_cases((), ())
    assert {case.name for case in found if case.training} == {case.name for case in found} - {"decode", "float8"}
    assert [case.length for case in found if case.name == "decode"] == list(gpu.DECODED)


def test_rows_are_chosen_by_name_length_width_and_step(gpu: Any) -> None:
    found = gpu.gpu_cases(("llama", "decode"), (512, 16384), (64, 256), ("forward",))
    assert len(found) == 8
    assert not any(case.training for case in found)
    assert {case.batch for case in found if case.name == "llama"} == {16, 1}


def test_verdicts(gpu: Any, table: Any) -> None:
    rows = [
        row(gpu, "llama", inductor=4.0, attnfuse=0.5, eager=13.0),
        row(gpu, "sinks", inductor=6.0, attnfuse=0.6),
        row(gpu, "softcap", inductor=3.0, attnfuse=1.0, flex_by_hand=1.25),
        row(gpu, "softcap", training=True, attnfuse=1.0, flex_by_hand=1.25),
        row(gpu, "bias", training=True, inductor=8.0, attnfuse=10.0),
        row(gpu, "decode", length=32768, attnfuse=0.6, eager=5.0),
    ]
    verdicts = {(target.claim, target.where): (target.value, target.met) for target in table.targets(rows)}
    assert verdicts["time / best peer, worst row", "bias N=4096 D=128 training"] == (1.25, False)
    assert verdicts["speed-up over inductor", "llama N=4096 D=128"] == (8.0, True)
    assert verdicts["speed-up over inductor", "softcap N=4096 D=128"] == (3.0, False)
    assert verdicts["speed-up over flex by hand", "softcap N=4096 D=128"] == (1.25, True)
    assert verdicts["speed-up over flex by hand", "softcap N=4096 D=128 training"] == (1.25, False)
    assert verdicts["sinks / causal", "N=4096 D=128"] == (1.2, False)
    # 2 x 16 x 8 x 32768 x 128 elements of two bytes, at 4.3 TB/s
    assert verdicts["time / reading the keys and values", "decode N=32768 D=128"] == (pytest.approx(1.2014, 1e-3), True)


def test_of_lengths_and_widths_the_worst_is_judged(gpu: Any, table: Any) -> None:
    rows = [row(gpu, "softcap", length=n, attnfuse=1.0, flex_by_hand=ms) for n, ms in ((512, 2.0), (1024, 1.1))]
    (verdict,) = (target for target in table.targets(rows) if "flex" in target.claim)
    assert (verdict.value, verdict.where) == (1.1, "softcap N=1024 D=128")


def test_a_row_without_our_figure_is_the_worst_and_one_without_peers_is_none(gpu: Any, table: Any) -> None:
    rows = [row(gpu, "sinks", attnfuse=1.0), row(gpu, "plain", attnfuse=1.1, eager=1.0)]
    assert (table.targets(rows)[0].value, table.targets(rows)[0].where) == (1.1, "plain N=4096 D=128")
    rows.append(row(gpu, "bias", eager=1.0))
    assert table.targets(rows)[0].where == "bias N=4096 D=128"
    assert not table.targets(rows)[0].met


def test_the_summary_counts_rows_and_names_the_slowest_first(gpu: Any, table: Any) -> None:
    rows = [
        row(gpu, "plain", attnfuse=1.0, SDPA_by_hand=1.0, flex_by_hand=2.0),
        row(gpu, "llama", attnfuse=1.01, SDPA_by_hand=1.0),
        row(gpu, "bias", attnfuse=1.5, flex_by_hand=1.0),
        row(gpu, "window", flex_by_hand=1.0),
        row(gpu, "sinks", attnfuse=1.0, inductor=9.0),
    ]
    first, *worst = table.summary(rows).splitlines()
    assert "of 4 rows" in first
    assert "1 at most 1.00, 2 at most 1.02" in first
    assert [line.split()[:2] for line in worst] == [["inf", "window"], ["1.500", "bias"], ["1.010", "llama"]]


def test_a_table_of_many_rows_has_sections_and_only_the_columns_it_needs(
    gpu: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table.torch.cuda, "get_device_name", lambda: "a GPU")
    rows = [row(gpu, name, length=n, attnfuse=1.0) for name in ("plain", "llama") for n in (512, 1024)]
    made = table.as_table(rows)
    assert [each.end_section for each in made.rows] == [False, True, False, True]
    assert "eager" not in [column.header for column in made.columns]


@pytest.mark.parametrize("lengths", [1, 16])
def test_a_picture_of_few_and_of_many_rows(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: int
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from benchmark import gpu_plot

    monkeypatch.setattr(gpu_plot.torch.cuda, "get_device_name", lambda: "a GPU")
    rows = [
        row(gpu, name, length=512 * 2**n, attnfuse=1.0, inductor=1.1)
        for name in ("plain", "bias")
        for n in range(lengths)
    ]
    gpu_plot.plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 0


def test_a_part_that_only_some_heads_read_is_what_is_compared(gpu: Any) -> None:
    case = gpu.GpuCase("llama", 512, "bf16")
    query, key = torch.zeros(16, 32, 512, 128), torch.zeros(16, 8, 512, 128)
    assert gpu._first(case, "query", query).shape == (1, 4, 512, 128)
    assert gpu._first(case, "key", key).shape == (1, 1, 512, 128)
    assert gpu._first(case, "slopes", torch.zeros(32)).shape == (4,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
