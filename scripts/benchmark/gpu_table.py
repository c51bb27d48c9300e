"""The GPU's rows as a table, as a picture, and held against what they must show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmark.gpu import GpuRow
from benchmark.peers import OURS, PEERS
from benchmark.targets import Target

__all__ = ["as_line", "as_table", "plot", "targets"]

#: Where a mask hides scores, and where of all peers only flex computes the program without a tensor for each score.
MASKED, ONLY_FLEX = ("llama", "softcap", "alibi", "window", "sinks"), ("softcap", "alibi")
#: The length that the masked variants are judged at, and the keys that decoding is.
JUDGED, DECODED = 4096, 32768
#: Bytes a second that a copy moves on an H200.
BANDWIDTH = 4.3e12


def ratio(row: GpuRow) -> float:
    """Our time over the fastest peer's."""
    others = [ms for name, ms in row.milliseconds.items() if name != OURS]
    return row.milliseconds[OURS] / min(others) if others and OURS in row.milliseconds else math.nan


def as_table(rows: Sequence[GpuRow]) -> Table:
    """One line a row, one column a peer with its error beside the time; then our time over the best peer's."""
    table = Table(title=f"milliseconds, error against float64; {torch.cuda.get_device_name()}, bf16")
    for heading in ("variant", "N", "D", "step", *PEERS, "/ best", "kernel"):
        table.add_column(heading, no_wrap=True, style="bold" if heading == OURS else None)
    for row in rows:
        case = (row.case.name, str(row.case.length), str(row.case.width), "fwd+bwd" if row.case.training else "fwd")
        table.add_row(*case, *(_cell(row, peer) for peer in PEERS), f"{ratio(row):.2f}", row.kernel)
    return table


def as_line(row: GpuRow) -> str:
    """One row, as soon as it is known."""
    figures = (f"{peer} {_cell(row, peer)}" for peer in PEERS if peer in row.milliseconds)
    return f"{row.case}: {', '.join(figures)}; {ratio(row):.3f} of the best, {row.kernel}"


def _cell(row: GpuRow, peer: str) -> str:
    return f"{row.milliseconds[peer]:.3f} {row.errors[peer]:.0e}" if peer in row.milliseconds else "-"


# --- what the rows must show ------------------------------------------------------------------------


def targets(rows: Sequence[GpuRow]) -> list[Target]:
    """No peer faster, Inductor and flex left behind, sinks nearly free, decoding near the memory's speed."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(ratio(row)) else ratio(row))
    found = [Target("time / best peer, worst row", ratio(worst), 1.0, where=str(worst.case))]
    for row in rows:
        found += _over_inductor(row) + _over_flex(row) + _over_floor(row)
    return found + _sinks(rows)


def _over_inductor(row: GpuRow) -> list[Target]:
    judged = row.case.name in MASKED and row.case.length == JUDGED and not row.case.training
    return [_speedup(row, "inductor", 4.0)] if judged and {OURS, "inductor"} <= set(row.milliseconds) else []


def _over_flex(row: GpuRow) -> list[Target]:
    judged = row.case.name in ONLY_FLEX and {OURS, "flex by hand"} <= set(row.milliseconds)
    return [_speedup(row, "flex by hand", 1.3 if row.case.training else 1.2)] if judged else []


def _speedup(row: GpuRow, peer: str, limit: float) -> Target:
    value = row.milliseconds[peer] / row.milliseconds[OURS]
    return Target(f"speed-up over {peer}", value, limit, at_least=True, where=str(row.case))


def _over_floor(row: GpuRow) -> list[Target]:
    if row.case.variant.rows is None or row.case.length != DECODED or OURS not in row.milliseconds:
        return []
    floor = row.case.read_bytes / BANDWIDTH * 1e3
    return [Target("time / reading the keys and values", row.milliseconds[OURS] / floor, 1.3, where=str(row.case))]


def _sinks(rows: Sequence[GpuRow]) -> list[Target]:
    ours = {(row.case.name, row.case.length, row.case.width): row.milliseconds.get(OURS) for row in rows
            if not row.case.training}  # fmt: skip
    pairs = [(key, ms, ours.get(("llama", *key[1:]))) for key, ms in ours.items() if key[0] == "sinks"]
    return [
        Target("sinks / causal", with_sinks / without, 1.15, where=f"N={key[1]} D={key[2]}")
        for key, with_sinks, without in pairs
        if with_sinks and without
    ]


def plot(rows: Sequence[GpuRow], path: Path) -> None:
    """Every peer's time over ours, a group of bars a row. Needs matplotlib."""
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shown = [row for row in rows if OURS in row.milliseconds]
    peers = [peer for peer in PEERS if peer not in (OURS, "eager")]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(shown) + 1.4))
    height = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        times = [row.milliseconds.get(peer, 0.0) / row.milliseconds[OURS] for row in shown]
        axes.barh([place * height - at for at in range(len(shown))], times, height, label=peer)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([0.3 - at for at in range(len(shown))], [str(row.case) for row in shown])
    axes.set_xlabel(f"times attnfuse's time; {torch.cuda.get_device_name()}")
    axes.set_xlim(0, 8)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
