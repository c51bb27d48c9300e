"""What was measured: kept on disk by ``attnfuse tune``, and asked by whoever chooses a kernel or a schedule."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from attnfuse.cache import Kept, believed, folder
from attnfuse.kernels.measured.case import Case, case_at, case_of
from attnfuse.kernels.measured.machine import machine, place
from attnfuse.kernels.problem import Problem
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Measured", "clear", "fastest_schedule", "forget", "keep", "near", "state"]

#: A case serves others of its kind up to so many doublings away, over all sizes.
REACH = 2


@dataclass(frozen=True)
class Measured:
    """Of one case: measured over modelled seconds by name, and the schedules that were fastest, as fields."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """The correction of a kernel, or of a :func:`rival`; one where nothing was measured."""
        found = self.ratios.get(name)
        return found or math.exp(sum(map(math.log, self.ratios.values())) / max(len(self.ratios), 1))


# --- what a choice asks -----------------------------------------------------------------------------


def near(problem: Problem, target: Target) -> Measured:
    """What was measured of the nearest case; nothing where none is near."""
    known = _known(target)
    return _nearest(known, case_of(problem)) if known else Measured()


def fastest_schedule(
    name: str,
    spec: AttentionSpec,
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    target: Target,
) -> Mapping[str, Any] | None:
    """The fields of the schedule of a kernel's forward that was measured as the fastest; None where none was."""
    known = _known(target)
    return _nearest(known, case_at(spec, dtype, query, key, value)).schedules.get(name) if known else None


def state() -> str:
    """A hash of all that was measured for the devices of this machine, for cache keys; empty where nothing was."""
    known = {str(target): _text(_known(target)) for target in (Target("cpu"), Target.current())}
    return hashlib.sha256(repr(known).encode()).hexdigest() if any(known.values()) else ""


def _nearest(known: Mapping[Case, Measured], case: Case) -> Measured:
    kin = [(case.distance(other), other.sizes) for other in known if other.kind == case.kind]
    distance, sizes = min(kin, default=(REACH + 1, ()))
    return known[Case(case.kind, sizes)] if distance <= REACH else Measured()


# --- what is kept -----------------------------------------------------------------------------------


def keep(target: Target, found: Mapping[Case, Measured]) -> Path:
    """Adds measurements to those that are kept. Raises :class:`BadInput` where they cannot be written."""
    path = place(target)
    assert path is not None, "what is measured is measured here"
    with Kept(path).changing() as content:
        content["machine"] = machine(target)
        cases = content.setdefault("cases", {})
        for case, measured in found.items():
            old = cases.setdefault(case.kind, {}).setdefault(case.written, {"ratios": {}, "schedules": {}})
            old["ratios"].update(measured.ratios)
            old["schedules"].update(measured.schedules)
    forget()
    return path


def clear() -> int:
    """Deletes all that was measured, for every device and version, and returns how many files that were."""
    files = [path for pattern in ("tuned-*.json", "tuned-*.damaged") for path in folder().glob(pattern)]
    for path in files:
        path.unlink(missing_ok=True)
    forget()
    return len(files)


def forget() -> None:
    """Reads the file again when it is next asked for."""
    _read.cache_clear()


def _known(target: Target) -> Mapping[Case, Measured]:
    path = place(target) if believed() else None
    return _NOTHING if path is None else _read(path)


_NOTHING: Mapping[Case, Measured] = MappingProxyType({})


@lru_cache(maxsize=8)
def _read(path: Path) -> Mapping[Case, Measured]:
    cases = Kept(path).read().get("cases", {})
    pairs = ((kind, sizes, each) for kind, by_sizes in cases.items() for sizes, each in by_sizes.items())
    return MappingProxyType({Case.read(kind, sizes): Measured(**each) for kind, sizes, each in pairs})


def _text(known: Mapping[Case, Measured]) -> str:
    written = sorted((str(case), vars(measured)) for case, measured in known.items())
    return json.dumps(written, sort_keys=True) if known else ""
