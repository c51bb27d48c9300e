"""The GPU's rows as a picture. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu import GpuRow
from benchmark.gpu_table import ratio
from benchmark.peers import OURS, PEERS

__all__ = ["plot"]

#: Rows that can be told apart as groups of bars.
FEW = 24


def plot(rows: Sequence[GpuRow], path: Path) -> None:
    """A few rows as bars, every peer's time over ours; many as maps, our time over the best peer's."""
    shown = [row for row in rows if OURS in row.milliseconds]
    figure = _bars(shown) if len(shown) <= FEW else _maps(shown)
    figure.savefig(path, dpi=110)


def _bars(rows: Sequence[GpuRow]) -> Any:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    peers = [peer for peer in PEERS if peer not in (OURS, "eager")]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.4))
    height = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        times = [row.milliseconds.get(peer, 0.0) / row.milliseconds[OURS] for row in rows]
        axes.barh([place * height - at for at in range(len(rows))], times, height, label=peer)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([0.3 - at for at in range(len(rows))], [str(row.case) for row in rows])
    axes.set_xlabel(f"times attnfuse's time; {torch.cuda.get_device_name()}")
    axes.set_xlim(0, 8)
    axes.legend(loc="lower right")
    figure.tight_layout()
    return figure


def _maps(rows: Sequence[GpuRow]) -> Any:
    """A panel for each width, forward and step: a line a variant that has a peer, a column a length."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    widths, lengths = (sorted({getattr(row.case, size) for row in rows}) for size in ("width", "length"))
    compared = [row for row in rows if not math.isnan(ratio(row))]
    # not every variant has a backward
    names = {training: list(dict.fromkeys(row.case.name for row in compared if row.case.training == training))
             for training in sorted({row.case.training for row in compared})}  # fmt: skip
    shape, tall = (len(names), len(widths)), sum(0.4 * len(each) + 1 for each in names.values())
    figure, panels = plt.subplots(
        *shape, figsize=((0.65 * len(lengths) + 1) * len(widths), tall), height_ratios=list(map(len, names.values())),
        squeeze=False, sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    for (at, training), (place, width) in product(enumerate(names), enumerate(widths)):
        part = {(row.case.name, row.case.length): ratio(row) for row in compared
                if (row.case.training, row.case.width) == (training, width)}  # fmt: skip
        _map(panels[at][place], part, names[training], lengths)
        panels[at][place].set_title(f"D = {width}, {'forward with backward' if training else 'forward'}")
    figure.suptitle(f"attnfuse's time over the best peer's; {torch.cuda.get_device_name()}")
    return figure


def _map(axes: Any, ratios: dict[tuple[str, int], float], names: Sequence[str], lengths: Sequence[int]) -> None:
    values = [[ratios.get((name, length), math.nan) for length in lengths] for name in names]
    axes.imshow(values, cmap="RdYlGn_r", vmin=0.5, vmax=1.5, aspect="auto")
    for (at, line), (place, _) in product(enumerate(values), enumerate(lengths)):
        if not math.isnan(line[place]):
            axes.text(place, at, f"{line[place]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), lengths, rotation=45)
    axes.set_yticks(range(len(names)), names)
