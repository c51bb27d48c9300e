"""What was measured on a Hopper GPU as text, JSON and a picture, which needs matplotlib."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch

from benchmark.hopper import Row

__all__ = ["as_text", "plot", "save"]


def save(rows: list[Row], path: Path) -> None:
    """Rows as JSON, and on what they were measured."""
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(about, indent=1))


def as_text(rows: list[Row]) -> str:
    """A table, a line a case; a star where the target is met."""
    head = f"{'case':34} {'peer':6} {'peer TF':>8} {'ours TF':>8} {'ratio':>6} {'target':>6}"
    head += f"   {'error: peer':>11} {'ours':>8}"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Row) -> str:
    met = "*" if row.ratio >= row.target else " "
    return (
        f"{row.case:34} {row.peer:6} {row.peer_tflops:8.0f} {row.ours_tflops:8.0f} {row.ratio:6.2f} {row.target:6.2f}"
        f" {met} {row.peer_error:11.1e} {row.ours_error:8.1e}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """Ratios as bars, the targets as marks. Needs matplotlib."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(10, 0.32 * len(rows) + 1.2))
    places = [-place for place in range(len(rows))]
    axes.barh(
        places, [row.ratio for row in rows], color=["#4477aa" if row.peer == "cudnn" else "#66aa88" for row in rows]
    )
    axes.plot([row.target for row in rows], places, "|", color="black", markersize=14)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, [f"{row.case}, {row.peer}" for row in rows])
    axes.set_xlabel("times the peer's speed; marks: targets")
    axes.set_xlim(0, math.ceil(max(row.ratio for row in rows) * 2) / 2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
