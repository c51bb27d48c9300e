"""The GPU's rows as a table, in a few sentences, and held against what they must show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from rich.table import Table

from benchmark.gpu import GpuRow
from benchmark.peers import OURS, PEERS
from benchmark.targets import Target

__all__ = ["as_line", "as_table", "by_hand", "ratio", "summary", "targets"]

#: Where a mask hides scores, and where of all peers only flex computes the program without a tensor for each score.
MASKED, ONLY_FLEX = ("llama", "softcap", "alibi", "window", "sinks"), ("softcap", "alibi")
#: The length that the masked variants are judged at, and the keys that decoding is.
JUDGED, DECODED = 4096, 32768
#: What is still as fast as a peer, and how many of the slowest rows are named.
AS_FAST, NAMED = (1.0, 1.02), 12
#: Bytes a second that a copy moves on an H200.
BANDWIDTH = 4.3e12


def ratio(row: GpuRow) -> float:
    """Our time over the fastest peer's."""
    others = [ms for name, ms in row.milliseconds.items() if name != OURS]
    return row.milliseconds[OURS] / min(others) if others and OURS in row.milliseconds else math.nan


def by_hand(row: GpuRow) -> float:
    """Our time over the faster one's that was written by hand; infinite where only ours is missing."""
    others = [ms for name, ms in row.milliseconds.items() if "by hand" in name]
    return row.milliseconds.get(OURS, math.inf) / min(others) if others else math.nan


def as_table(rows: Sequence[GpuRow]) -> Table:
    """One line a row, one column a peer with its error beside the time; then our time over the best peer's."""
    table = Table(title=f"milliseconds, error against float64; {torch.cuda.get_device_name()}, bf16")
    peers = [peer for peer in PEERS if any(peer in row.milliseconds for row in rows)]
    for heading in ("variant", "N", "D", "step", *peers, "/ best", "kernel"):
        table.add_column(heading, no_wrap=True, style="bold" if heading == OURS else None)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        case = (row.case.name, str(row.case.length), str(row.case.width), "fwd+bwd" if row.case.training else "fwd")
        ends = following is None or (following.case.name, following.case.width) != (row.case.name, row.case.width)
        cells = (_cell(row, peer) for peer in peers)
        table.add_row(*case, *cells, f"{ratio(row):.2f}", row.kernel, end_section=ends)
    return table


def summary(rows: Sequence[GpuRow]) -> str:
    """How many rows are as fast as by hand, and those that are least so."""
    judged = sorted((row for row in rows if not math.isnan(by_hand(row))), key=by_hand, reverse=True)
    counts = (f"{sum(by_hand(row) <= most for row in judged)} at most {most:.2f}" for most in AS_FAST)
    worst = [f"  {by_hand(row):.3f}  {as_line(row)}" for row in judged[:NAMED] if by_hand(row) > min(AS_FAST)]
    said = f"time / by hand, of {len(judged)} rows that have both: {', '.join(counts)}"
    return "\n".join([f"{said}; the worst:", *worst] if worst else [said])


def as_line(row: GpuRow) -> str:
    """One row, as soon as it is known."""
    figures = (f"{peer} {_cell(row, peer)}" for peer in PEERS if peer in row.milliseconds)
    return f"{row.case}: {', '.join(figures)}; {ratio(row):.3f} of the best, {row.kernel}"


def _cell(row: GpuRow, peer: str) -> str:
    return f"{row.milliseconds[peer]:.3f} {row.errors[peer]:.0e}" if peer in row.milliseconds else "-"


# --- what the rows must show ------------------------------------------------------------------------


def targets(rows: Sequence[GpuRow]) -> list[Target]:
    """No peer faster, Inductor and flex left behind, sinks nearly free, decoding near the memory's speed.

    Of a variant's lengths and widths the worst.
    """
    # ours alone is beside nobody
    beside = [row for row in rows if set(row.milliseconds) != {OURS}]
    worst = sorted(beside, key=lambda row: -math.inf if math.isnan(ratio(row)) else -ratio(row))[:1]
    found: dict[tuple[str, bool], list[GpuRow]] = {}
    for row in rows:
        found.setdefault((row.case.name, row.case.training), []).append(row)
    claims = (_over_inductor, _over_flex, _over_floor)
    held = [target for claim in claims for each in found.values() for target in _worst(map(claim, each))]
    first = [Target("time / best peer, worst row", ratio(row), 1.0, where=str(row.case)) for row in worst]
    return [*first, *held, *_sinks(rows)]


def _worst(claimed: Iterable[list[Target]]) -> list[Target]:
    found = [target for each in claimed for target in each]
    return sorted(found, key=lambda target: target.value if target.at_least else -target.value)[:1]


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
    claims = [
        [Target("sinks / causal", with_sinks / without, 1.15, where=f"N={key[1]} D={key[2]}")]
        for key, with_sinks, without in pairs
        if with_sinks and without
    ]
    return _worst(claims)
