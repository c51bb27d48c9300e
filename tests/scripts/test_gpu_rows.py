"""Rows of the GPU's benchmark, prepared side by side: which together, and what becomes of peers that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PEERS = ("SDPA by hand", "flex by hand", "attnfuse")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark import gpu_rows

    return gpu_rows


def case(rows: Any, name: str, length: int = 512, *, training: bool = False) -> Any:
    return rows.GpuCase(name, length, "bf16", training)


def test_a_batch_has_room_for_its_rows_and_for_one_in_float64(rows: Any) -> None:
    from benchmark.batches import Need, batches

    needs = {"a": Need(50, 0), "b": Need(40, 0), "c": Need(20, 0), "d": Need(10, 0), "e": Need(5, 0)}
    assert batches(needs, 130, 5) == [["a", "b", "c", "d", "e"]]
    assert batches(needs, 100, 5) == [["a", "d", "e"], ["b", "c"]]
    # two in float64 are never there at once, but each leaves less room
    assert batches({"a": Need(50, 30), "b": Need(20, 30)}, 100, 5) == [["a", "b"]]
    assert batches({"a": Need(50, 30), "b": Need(21, 30)}, 100, 5) == [["a"], ["b"]]
    # by number
    assert sorted(len(batch) for batch in batches(needs, 1000, 2)) == [1, 2, 2]
    # nothing fits beside it, nor has it room itself
    assert batches({"a": Need(1, 0), "b": Need(200, 0), "c": Need(1, 0)}, 100, 5) == [["b"], ["a", "c"]]
    assert batches({}, 100, 3) == []


def test_every_row_of_the_whole_table_is_in_one_batch(rows: Any) -> None:
    from benchmark.gpu import gpu_cases

    cases = gpu_cases((), (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256))
    dealt = rows.Machine(2, 0.85 * 150e9, 32).dealt(cases, PEERS)
    assert sorted(map(str, cases)) == sorted(str(each) for parts in dealt for part in parts for each in part)
    assert all(len(parts) <= 2 and len(part) <= 32 for parts in dealt for part in parts)
    assert len(dealt) <= 7


def test_few_rows_are_dealt_to_all_gpus(rows: Any) -> None:
    cases = [case(rows, "plain", length) for length in (128, 256, 512, 1024)]
    (parts,) = rows.Machine(2, 1e11, 32).dealt(cases, PEERS)
    assert sorted(len(part) for part in parts) == [2, 2]


def test_what_is_as_large_as_the_scores_is_reckoned_with(rows: Any) -> None:
    from benchmark.batches import need

    scores = 2 * 32 * 16384**2
    bias, plain, alibi = (case(rows, name, 16384, training=True) for name in ("bias", "plain", "alibi"))
    assert need(bias, PEERS).held > 4 * scores
    assert need(plain, PEERS).held < scores < need(alibi, PEERS).held
    assert need(alibi, ("attnfuse",)).held < scores
    assert need(plain, ("eager",)).held > 6 * scores


def answers(folder: str, case: Any, gpu: int, lock: str) -> dict[str, Callable[..., Any]]:
    """Of a process without a GPU: flex breaks it in ``bias``, SDPA finds no memory the first time in ``window``."""
    from benchmark.gpu import GpuRow

    added: list[str] = []

    def add(peer: str) -> str:
        Path(folder, f"{case.name} {os.getpid()} {peer}").touch()
        if (case.name, peer) == ("bias", "flex by hand"):
            os._exit(1)
        if (case.name, peer) == ("window", "SDPA by hand") and len(list(Path(folder).glob("window*SDPA*"))) == 1:
            return "OutOfMemoryError: CUDA out of memory"
        if (case.name, peer) == ("sinks", "SDPA by hand"):
            return "cannot express it"
        added.append(peer)
        return ""

    if case.name == "softcap":
        raise RuntimeError("no inputs")
    return {"add": add, "row": lambda: GpuRow(case, dict.fromkeys(added, float(gpu)), "triton")}


def test_a_peer_that_breaks_its_process_takes_no_other_along(rows: Any, tmp_path: Path) -> None:
    names = ("bias", "window", "sinks", "softcap")
    cases = [case(rows, name) for name in names]
    machine = rows.Machine(2, 1e11, 32)
    found = {row.case.name: row for row in rows.measure_rows(cases, PEERS, machine, partial(answers, str(tmp_path)))}
    assert set(found) == set(names)
    assert (list(found["bias"].milliseconds), found["bias"].absent) == (
        ["SDPA by hand", "attnfuse"],
        {"flex by hand": "its process died"},
    )
    assert list(found["window"].milliseconds) == list(PEERS)
    assert found["sinks"].absent == {"SDPA by hand": "cannot express it"}
    assert found["softcap"].absent == dict.fromkeys(PEERS, "RuntimeError: no inputs")
    # two rows each, of the two GPUs
    assert {ms for row in found.values() for ms in row.milliseconds.values()} == {0.0, 1.0}


def late(case: Any, gpu: int, lock: str) -> dict[str, Callable[..., Any]]:
    import time

    return {"add": lambda peer: time.sleep(60 if peer == "flex by hand" else 0), "row": lambda: None}


def test_a_row_that_is_not_ready_in_time_has_no_figures(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PATIENCE", 25.0)
    (row,) = rows.measure_rows([case(rows, "plain")], PEERS[1:], rows.Machine(1, 1e11, 2), late)
    assert row.absent == dict.fromkeys(PEERS[1:], "it was not ready in time")
    assert not row.milliseconds


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["softcap", "sinks", "bias"])
def test_a_head_at_a_time_comes_to_all_heads_of_a_group(
    rows: Any, monkeypatch: pytest.MonkeyPatch, name: str, training: bool
) -> None:
    import torch

    from benchmark import gpu

    row = gpu.GpuCase(name, 16, "bf16", training, 8)
    group = 32 // row.kv_heads
    extra = {"softcap": {}, "sinks": {"sink": torch.randn(32)}, "bias": {"table": torch.randn(32, 16, 16)}}[name]
    heads = {"query": 32, "key": row.kv_heads, "value": row.kv_heads}
    given = {part: torch.randn(1, each, 16, 8) for part, each in heads.items()} | extra
    grad = torch.randn(1, 16, 256)
    monkeypatch.setattr(gpu, "_gradient", lambda case: grad)
    leaves = {part: x.double().requires_grad_() for part, x in given.items()}
    out = row.variant.program(**leaves)
    wide = torch.autograd.grad(out, [leaves[part] for part in heads], grad.double()) if training else (out.detach(),)
    parts = tuple(heads) if training else ("out",)
    for part, found, true in zip(parts, gpu._truth(row, given), wide, strict=True):
        torch.testing.assert_close(found, gpu._first(row, part, true))
    assert group == (1 if name == "bias" else 4)
