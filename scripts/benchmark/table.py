"""The rows as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from benchmark.measure import Figure, Row
from benchmark.peers import OURS, PEERS
from benchmark.targets import Target

__all__ = ["as_json", "as_line", "as_table", "machine"]


def as_table(rows: Sequence[Row]) -> Table:
    """One line a row, one column a peer."""
    table = Table(title=f"milliseconds, peak MB, largest error against float64; {machine()}")
    for heading in ("variant", "N", "dtype"):
        table.add_column(heading, no_wrap=True)
    for peer in PEERS:
        table.add_column(peer, justify="right", no_wrap=True, style="bold" if peer == OURS else None)
    table.add_column("/ best", justify="right", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for row in rows:
        case = (row.case.name, str(row.case.length), row.case.dtype)
        cells = (_cell(row.figures.get(peer)) for peer in PEERS)
        table.add_row(*case, *cells, "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}", row.kernel)
    return table


def as_line(row: Row) -> str:
    """One row while the others are still being measured."""
    times = ", ".join(f"{name} {figure.milliseconds:.4g}" for name, figure in row.figures.items())
    return f"{row.case}: {times} ms; {row.kernel}, {row.ratio:.2f} of the best"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    peak = "?" if figure.peak is None else f"{figure.peak / 1e6:.0f}"
    return f"{figure.milliseconds:.4g} {peak:>5} {figure.max_error:.0e}"


def machine() -> str:
    """What the figures were taken on, in a few words."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{gpu}{platform.machine()}, {cores}, torch {torch.__version__}"


def as_json(content: dict[str, Sequence[Any]], targets: Sequence[Target]) -> str:
    """``content`` (sequences of dataclasses by name) and the targets with their verdicts."""
    listed = {name: [asdict(each) for each in found] for name, found in content.items()}
    judged = [{**asdict(target), "met": target.met} for target in targets]
    return json.dumps({"machine": machine(), **listed, "targets": judged}, indent=1)
