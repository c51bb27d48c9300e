"""What ``attnfuse tune`` measured on this machine, and how it corrects what the model says that kernels cost.

Measurements are kept in one file for each device, versions and registry, under the case they were made of. A kernel's
correction is its measured time over its modelled one, so that a case serves sizes near its own. What was not measured
in a case that was counts as off by as much as the others there, on geometric average: choices are ratios.
``ATTNFUSE_CALIBRATE=0`` leaves all to the model. A process reads its file once, so that its choices do not change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from attnfuse.cache import Kept, believed, folder
from attnfuse.features import Scale, features
from attnfuse.kernels.cpu.calibrate import processor
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import UNFUSED, registered
from attnfuse.score import P, text
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from attnfuse.version import __version__

__all__ = [
    "Case",
    "Measured",
    "case_of",
    "clear",
    "fastest_schedule",
    "forget",
    "keep",
    "near",
    "place",
    "present",
    "rival",
    "state",
]

#: Case sizes are powers of two; a case serves others of its kind up to so many doublings away, over all sizes.
REACH = 2
_NUMBER = re.compile(r"\d[\d.]*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Case:
    """What measurements are kept under: a kind of attention, and logarithms of its sizes."""

    kind: str
    sizes: tuple[int, ...]

    def distance(self, other: Case) -> int:
        """Doublings between two cases of one kind."""
        return sum(abs(a - b) for a, b in zip(self.sizes, other.sizes, strict=True))


@dataclass(frozen=True)
class Measured:
    """Of one case: measured over modelled seconds by name, and the schedules that were fastest, as fields."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """The correction of a kernel, or of a :func:`rival`; one where nothing was measured."""
        found = self.ratios.get(name)
        return found or math.exp(sum(map(math.log, self.ratios.values())) / max(len(self.ratios), 1))


# --- cases ------------------------------------------------------------------------------------------


def case_of(problem: Problem) -> Case:
    """The case that a problem is: kernels take as long whatever its constants and its source are."""
    query, key, value = problem.query, problem.key, problem.value
    return _case(problem.spec, query.dtype, query.shape, key.shape, value.shape, problem.training)


@lru_cache(maxsize=4096)
def _case(
    spec: AttentionSpec,
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    training: bool,
) -> Case:
    when = "training" if training else "inference"
    kind = f"{_kind(spec)}, {str(dtype).removeprefix('torch.')}, {query[-1]}x{value[-1]}, {when}"
    sizes = (math.prod(query[:-2]), query[-3] / max(key[-3], 1), query[-2], key[-2])
    return Case(kind, tuple(round(math.log2(max(size, 1))) for size in sizes))


def _kind(spec: AttentionSpec) -> str:
    """The names of a spec's features, or its program without its numbers; a scale costs nothing."""
    named = features(spec)
    words = [_NUMBER.sub("#", text(spec.score))]
    if named is not None:
        words = [type(each).__name__.lower() for each in named if not isinstance(each, Scale)]
    facts = {
        "no softmax": spec.normaliser == "none",
        "dropout": spec.dropout > 0,
        "exact scores": spec.exact_scores,
        "weights": spec.weight != P,
    }
    words += [word for word, holds in facts.items() if holds]
    words += [f"[{' '.join(captured.axes)}]" for captured in spec.captures]
    return " ".join(words) or "plain"


def rival(problem: Problem) -> str:
    """The name under which the graph as it is is measured: how it is written and compiled decides what it takes."""
    return f"{UNFUSED}, {problem.source}, {'compiled' if problem.compiled else 'eager'}"


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
    return _nearest(known, _case(spec, dtype, query, key, value, False)).schedules.get(name) if known else None


def state() -> str:
    """A hash of all that was measured for the devices of this machine, for cache keys; empty where nothing was."""
    known = {str(target): _text(_known(target)) for target in (Target("cpu"), Target.current())}
    return hashlib.sha256(repr(known).encode()).hexdigest() if any(known.values()) else ""


def _nearest(known: Mapping[Case, Measured], case: Case) -> Measured:
    kin = [(case.distance(other), other.sizes) for other in known if other.kind == case.kind]
    distance, sizes = min(kin, default=(REACH + 1, ()))
    return known[Case(case.kind, sizes)] if distance <= REACH else Measured()


# --- where it is kept -------------------------------------------------------------------------------


def place(target: Target) -> Path | None:
    """The file of a target; None where it is no device of this machine."""
    machine = _machine(target)
    if machine is None:
        return None
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    device = "".join(letter if letter.isalnum() else "-" for letter in machine["device"])
    return folder() / f"tuned-{device}-{key}.json"


def present(target: Target) -> bool:
    """Whether a target is a device of this machine."""
    return _device(target) is not None


def keep(target: Target, found: Mapping[Case, Measured]) -> Path:
    """Adds measurements to those that are kept. Raises :class:`BadInput` where they cannot be written."""
    path = place(target)
    assert path is not None, "what is measured is measured here"
    with Kept(path).changing() as content:
        content["machine"] = _machine(target)
        cases = content.setdefault("cases", {})
        for case, measured in found.items():
            old = cases.setdefault(case.kind, {}).setdefault(_sizes_text(case), {"ratios": {}, "schedules": {}})
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
    return MappingProxyType({Case(kind, _sizes(sizes)): Measured(**each) for kind, sizes, each in pairs})


def _sizes(written: str) -> tuple[int, ...]:
    return tuple(map(int, written.split("x")))


def _sizes_text(case: Case) -> str:
    return "x".join(map(str, case.sizes))


def _text(known: Mapping[Case, Measured]) -> str:
    return json.dumps(sorted((str(case), vars(measured)) for case, measured in known.items()), sort_keys=True) * bool(
        known
    )


def _machine(target: Target) -> dict[str, str] | None:
    """All that a measurement depends on beside its case; None for a target that is no device of this machine."""
    device = _device(target)
    if device is None:
        return None
    return {
        "device": device,
        "target": str(target),
        "threads": str(torch.get_num_threads()) if target.kind == "cpu" else "",
        "attnfuse": __version__,
        "torch": str(torch.__version__),
        "triton": _triton(),
        "kernels": registered(),
    }


def _device(target: Target) -> str | None:
    if target.kind == "cpu":
        return processor()
    if target != Target.current():
        return None
    name: str = torch.xpu.get_device_name() if target.kind == "xpu" else torch.cuda.get_device_name()
    return name


@lru_cache(maxsize=1)
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
