"""What was done, site by site, and why: the answer every door gives beside its result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from attnfuse.errors import Refused

__all__ = ["Certificate", "Fused", "Lying", "Region", "Report", "Site", "grouped"]

#: What tells ``matmul_3`` and ``matmul_5`` apart.
_NUMBER = re.compile(r"_\d+\b")


@dataclass(frozen=True)
class Certificate:
    """How one fusion was checked: errors against float64 of the source and of the fused node.

    ``mean`` and ``max`` are absolute errors over all inputs tried; ``inputs`` names them;
    ``shape`` says at what sizes, where those were not the site's own; ``skipped`` why no check ran (empty when it did).
    """

    seed: int = 0
    inputs: tuple[str, ...] = ()
    source_mean: float = 0.0
    source_max: float = 0.0
    fused_mean: float = 0.0
    fused_max: float = 0.0
    shape: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Fused:
    """One site that was replaced. ``spec`` is its text; ``what`` its features in words.

    ``seconds`` are the gate's estimates: ``{"kernel": 0.001, "unfused": 0.004}``; ``notes`` are what a
    careful user must know (dropout's random stream, "fast" numerics). ``layouts`` says of each operand whether its
    columns, ``"d"``, or its rows, ``"n"``, are contiguous; ``copies`` how many tensors were copied for that in the
    source, and how many are.
    """

    node: str
    source: str
    spec: str
    what: str
    shape: str
    kernel: str
    seconds: dict[str, float] = field(default_factory=dict)
    certificate: Certificate = field(default_factory=Certificate)
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Lying:
    """A value, how it lies in the source and how it lies now; ``reads`` are the values it is made of, by number.

    ``seconds`` is the price of having it so, ``copied`` that of the copies of it that others read.
    """

    name: str
    what: str
    before: str
    now: str
    reads: tuple[int, ...] = ()
    seconds: float = 0.0
    copied: float = 0.0


@dataclass(frozen=True)
class Region:
    """The values that the operands of some fused nodes come from, and how each lies.

    ``seconds`` are what layouts cost by different rules: ``chosen``; ``fold`` leaves all as it is and lets kernels
    read it so; ``copy`` copies the operands that a kernel wants otherwise; ``propagate`` turns all that can be.
    """

    sites: tuple[str, ...]
    values: tuple[Lying, ...]
    copies: tuple[int, int]
    seconds: dict[str, float]


Site = Fused | Refused
S = TypeVar("S", bound=Fused | Refused)


@dataclass(frozen=True)
class Report:
    """All sites of one graph in graph order, the time each stage took in seconds, and where layouts were a question."""

    sites: tuple[Site, ...] = ()
    target: str = "cpu"
    stages: dict[str, float] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()

    @property
    def fused(self) -> tuple[Fused, ...]:
        """The sites that were replaced."""
        return tuple(site for site in self.sites if isinstance(site, Fused))

    @property
    def refused(self) -> tuple[Refused, ...]:
        """The sites that were left as they are."""
        return tuple(site for site in self.sites if isinstance(site, Refused))

    def __add__(self, other: Report) -> Report:
        """Two graphs of one program (sub-modules, graph breaks) as one report."""
        keys = {**self.stages, **other.stages}
        stages = {key: self.stages.get(key, 0.0) + other.stages.get(key, 0.0) for key in keys}
        return Report(self.sites + other.sites, self.target, stages, self.regions + other.regions)

    def to_json(self) -> str:
        """The whole report; each site carries ``"fused": true`` or ``false``."""
        sites = [{"fused": isinstance(site, Fused), **asdict(site)} for site in self.sites]
        regions = [asdict(region) for region in self.regions]
        return json.dumps({"target": self.target, "stages": self.stages, "sites": sites, "regions": regions}, indent=1)

    def __str__(self) -> str:
        head = f"attention sites: {len(self.sites)}, fused: {len(self.fused)}, refused: {len(self.refused)}"
        return "\n".join([head, *_grouped(self.sites)])


def grouped(sites: Iterable[S]) -> list[list[S]]:
    """Equal sites together, in order of first appearance. Layers of a model differ in the numbers of their nodes."""
    groups: dict[str, list[S]] = {}
    for site in sites:
        alike = _line(site) if isinstance(site, Fused) else _NUMBER.sub("", _line(site))
        groups.setdefault(alike, []).append(site)
    return list(groups.values())


def _grouped(sites: tuple[Site, ...]) -> list[str]:
    """One line for each group: ``24 x scale 0.125, causal -> sdpa``."""
    return [f"  {len(members):>3} x {_line(members[0])}  ({_names(members)})" for members in grouped(sites)]


def _layouts(site: Fused) -> str:
    """What is worth a word about layouts: operands whose rows are contiguous, and copies."""
    turned = [f"{name}^T" for name, minor in site.layouts.items() if minor == "n"]
    before, now = site.copies
    counted = [f"copies {before} -> {now}"] if before or now else []
    return f" ({', '.join([*turned, *counted])})" if turned or counted else ""


def _names(members: list[Site]) -> str:
    first = members[0].node
    return first if len(members) == 1 else f"{first} ... {members[-1].node}"


def _line(site: Site) -> str:
    match site:
        case Fused():
            return f"fused    {site.what} {site.shape} -> {site.kernel}{_layouts(site)}"
        case Refused():
            where = f" at {site.source}" if site.source else ""
            return f"refused  {site.reason}{where}{'; ' + site.remedy if site.remedy else ''}"
