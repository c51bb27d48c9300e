"""Where transposes went: a region of a report in words, and as a drawing in the DOT language of graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence

from attnfuse.errors import BadInput
from attnfuse.report import Lying, Region

__all__ = ["as_dot", "as_svg", "as_text"]

#: What the rules of :class:`attnfuse.report.Region` are called.
_RULES = {
    "fold": "left to the kernel",
    "copy": "operands copied",
    "propagate": "turned wherever possible",
}
_COLOURS = {"d": "#dbe9f6", "n": "#fde0c5"}


def as_text(regions: Sequence[Region]) -> str:
    """Each region: what was decided, the copies before and after, the values, and what other rules would cost.

    Equal regions, as those of a model's layers are, are one paragraph.
    """
    if not regions:
        return "no kernel would be faster with an operand in another layout"
    groups: dict[str, list[Region]] = {}
    for region in regions:
        groups.setdefault(_alike(region), []).append(region)
    return "\n\n".join("\n".join(_paragraph(group[0], len(group))) for group in groups.values())


def _alike(region: Region) -> str:
    """Equal for regions that differ in names alone."""
    values = [(v.what, v.before, v.now, v.reads, v.seconds, v.copied) for v in region.values]
    return repr((values, region.copies, region.seconds))


def _paragraph(region: Region, count: int) -> Iterator[str]:
    more = f" and {count - 1} like it" if count > 1 else ""
    before, after = region.copies
    yield f"{', '.join(region.sites)}{more}: {_decision(region)}; copies {before} -> {after}"
    width = max(len(value.name) for value in region.values)
    for value in region.values:
        change = value.now if value.now == value.before else f"{value.before} -> {value.now}"
        paid = f"  {_time(value.seconds)}" if value.seconds else ""
        copied = f"  copied, {_time(value.copied)}" if value.copied else ""
        yield f"  {value.name:<{width}}  {change:<6}  {value.what}{paid}{copied}".rstrip()
    yield f"  chosen: {_time(region.seconds['chosen'])}; {'; '.join(_alternatives(region))}"


def _decision(region: Region) -> str:
    turned = [value.name for value in region.values if value.now != value.before and not value.reads]
    copied = [value.name for value in region.values if value.copied]
    gain = region.seconds["fold"] - region.seconds["chosen"]
    if turned:
        done = f"propagated into {', '.join(turned)}"
    elif copied:
        done = f"copied at {', '.join(copied)}"
    else:
        return "folded: kernels read what is there"
    return f"{done}, saves {_time(gain)}"


def _alternatives(region: Region) -> Iterator[str]:
    yield from (f"{words}: {_time(region.seconds[rule])}" for rule, words in _RULES.items())


def _time(seconds: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    if seconds == float("inf"):
        return "impossible"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def as_dot(regions: Sequence[Region]) -> bytes:
    """A directed graph, in UTF-8: values coloured by layout, readers of a copy behind a dashed edge."""
    lines = ["digraph layouts {", "  rankdir=TB; node [shape=box, style=filled, fontname=Helvetica];"]
    for number, region in enumerate(regions):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(', '.join(region.sites))};"]
        lines += [f"    {line}" for line in _drawn(region.values, number)]
        lines.append("  }")
    return "\n".join([*lines, "}\n"]).encode()


def _drawn(values: Sequence[Lying], number: int) -> Iterator[str]:
    for at, value in enumerate(values):
        label = f"{value.name}\n{value.what}, {value.now}-minor"
        changed = ", penwidth=3" if value.now != value.before else ""
        yield f"r{number}_{at} [label={_quoted(label)}, fillcolor={_quoted(_COLOURS[value.now])}{changed}];"
        for read in value.reads:
            copied = values[read].now != value.now
            style = f" [style=dashed, label={_quoted(f'copy, {_time(values[read].copied)}')}]" if copied else ""
            yield f"r{number}_{read} -> r{number}_{at}{style};"


def _quoted(words: str) -> str:
    escaped = words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def as_svg(regions: Sequence[Region]) -> bytes:
    """The drawing, made by graphviz. Raises :class:`BadInput` where its ``dot`` is not installed, or fails."""
    program = shutil.which("dot")
    if program is None:
        raise BadInput("an SVG is drawn by graphviz's `dot`, which is not installed; --dot needs nothing")
    done = subprocess.run([program, "-Tsvg"], input=as_dot(regions), capture_output=True, check=False)
    if done.returncode:
        raise BadInput(f"graphviz's `dot` failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
