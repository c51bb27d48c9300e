"""Times every kernel that can compute a problem, the schedules that it has for it, and the graph as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnfuse.errors import BadInput, NoKernel
from attnfuse.kernels import UNFUSED, Kernel, Problem, kernels, lookup, measured, modelled
from attnfuse.operands import Operands
from attnfuse.target import Target
from attnfuse.tuning.calls import Call, as_it_is, by_kernel, by_schedule, directly, given

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

__all__ = ["Figure", "as_measured", "measure"]

#: A schedule replaces a kernel's own choice where it takes less of its time than this.
NOTICEABLE = 0.97
#: How often every call has its turn.
ROUNDS = 5


@dataclass(frozen=True)
class Figure:
    """One row of the result: ``seconds`` of one call, None with the ``remark`` why; ``modelled`` are the model's.

    ``name`` is a kernel's, or that of the :func:`attnfuse.kernels.measured.rival`; ``schedule`` are the fields of the
    fastest schedule, where that is another than the kernel chose.
    """

    name: str
    modelled: float
    seconds: float | None = None
    remark: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)


def measure(problem: Problem, target: Target, seconds: float, tell: Callable[[str], None]) -> tuple[Figure, ...]:
    """A figure for each kernel that does not refuse, in order of registration, and for the graph as it is.

    ``seconds`` are how long each is timed, ``tell`` hears what is being timed. Raises :class:`NoKernel` where none
    can, :class:`BadInput` where ``target`` is no device of this machine.
    """
    if not measured.present(target):
        raise BadInput(f"{target} cannot be measured here: this machine has {Target.current()}")
    able = modelled(problem, target)
    if set(able) <= {UNFUSED}:
        raise NoKernel(f"no kernel can compute this attention on {target}")
    device = torch.device("cuda" if target.kind == "rocm" else target.kind)
    bench = _Bench(problem, target, given(problem, device), seconds, tell)
    with torch.set_grad_enabled(problem.training):
        found = bench.figures({lookup(name): able[name] for name in kernels() if name in able}, able[UNFUSED])
        return tuple(map(bench.scheduled, found))


def as_measured(figures: Sequence[Figure]) -> measured.Measured:
    """What the cost model is corrected by."""
    ratios = {each.name: each.seconds / each.modelled for each in figures if each.seconds and each.modelled}
    return measured.Measured(ratios, {each.name: each.schedule for each in figures if each.schedule})


@dataclass(frozen=True)
class _Bench:
    """One problem on one device."""

    problem: Problem
    target: Target
    operands: Operands
    seconds: float
    tell: Callable[[str], None]

    def figures(self, modelled: Mapping[Kernel, float], unfused: float) -> list[Figure]:
        """Of each kernel, by the schedule that it chooses itself, and of the graph as it is."""
        problem, operands = self.problem, self.operands
        rows = {kernel.name: (each, partial(by_kernel, kernel, problem, operands)) for kernel, each in modelled.items()}
        rows[measured.rival(problem)] = unfused, partial(as_it_is, problem, operands)
        took = self._timed({name: make for name, (_, make) in rows.items()})
        return [_figure(name, each, took[name]) for name, (each, _) in rows.items()]

    def scheduled(self, own: Figure) -> Figure:
        """The figure of a kernel by its fastest schedule."""
        if own.name not in kernels() or own.seconds is None or self.problem.training:
            return own
        kernel = lookup(own.name)
        schedules = kernel.schedules(self.problem, self.target)
        if not schedules:
            return own
        # without the operator, which takes time of its own
        alone = directly(kernel, self.problem, self.operands)
        expected = alone()
        makes = {
            f"schedule {place} of {len(schedules)}": partial(self._agreeing, kernel, schedule, expected)
            for place, schedule in enumerate(schedules, 1)
        }
        took = self._timed({kernel.name: lambda: alone, **makes})
        return _faster(own, took.pop(kernel.name), list(zip(schedules, took.values(), strict=True)))

    def _agreeing(self, kernel: Kernel, schedule: Any, expected: Tensor) -> Call:
        """A call by a schedule, after a look at what it computes: schedules differ in nothing but rounding."""
        call = by_schedule(kernel, schedule, self.problem, self.operands)
        value, keys = self.operands.value, self.problem.keys
        # weights and out are rounded in both, and float32 sums of as many terms as there are keys
        rounding = 4 * torch.finfo(value.dtype).eps + 2 * keys * torch.finfo(torch.float32).eps
        out = call()
        off = (out.double() - expected.double()).abs().nan_to_num().max().item()
        if not torch.equal(out.isnan(), expected.isnan()) or off > rounding * value.double().abs().max().item():
            raise ValueError(f"it is off by {off:.2g}")
        return call

    def _timed(self, makes: Mapping[str, Callable[[], Call]]) -> dict[str, float | str]:
        """Seconds of each call, or how it failed; the least of some rounds, in each of which every call has its turn,
        so that a machine that slows down slows all of them.
        """
        timers: dict[str, Timer] = {}
        failed: dict[str, float | str] = {}
        for name, make in makes.items():
            self.tell(name)
            try:
                timers[name] = _warm(make())
            except Exception as error:  # noqa: BLE001 - what fails is not measured, and its row says why
                failed[name] = f"failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self.tell(f"timing {len(timers)} calls")
        part = self.seconds / ROUNDS
        often = {name: max(1, math.ceil(part / timer.timeit(1).mean)) for name, timer in timers.items()}
        rounds = [{name: each.timeit(often[name]).mean for name, each in timers.items()} for _ in range(ROUNDS)]
        return {name: failed.get(name) or min(each[name] for each in rounds) for name in makes}


def _warm(call: Call) -> Timer:
    # it imports torch's compilers of extensions, which look for a CUDA toolkit and log what they find
    from torch.utils.benchmark import Timer  # noqa: PLC0415

    call()
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def _figure(name: str, modelled: float, took: float | str) -> Figure:
    return Figure(name, modelled, remark=took) if isinstance(took, str) else Figure(name, modelled, took)


def _faster(own: Figure, alone: float | str, found: Sequence[tuple[Any, float | str]]) -> Figure:
    """The figure with the fastest schedule, where that is noticeably faster than ``alone``, the kernel's own."""
    able = [(seconds, place) for place, (_, seconds) in enumerate(found) if isinstance(seconds, float)]
    if not able or isinstance(alone, str) or own.seconds is None:
        return own
    seconds, place = min(able)
    if seconds >= NOTICEABLE * alone:
        return own
    remark = f"{alone / seconds:.2f} times as fast as by its own schedule"
    schedule = asdict(found[place][0])
    return replace(own, seconds=own.seconds * seconds / alone, remark=remark, schedule=schedule)
