"""One run of ``attnfuse tune``: what is asked for is measured, shown, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import typer

from attnfuse.candidates import Asked
from attnfuse.features import describe
from attnfuse.kernels import Operand, Problem, kernels, measured
from attnfuse.reference import name_of
from attnfuse.screen import Steps, show_rows, steps
from attnfuse.target import Target
from attnfuse.tuning.figures import Figure, as_measured, measure

__all__ = ["Wanted", "run"]


@dataclass(frozen=True)
class Wanted:
    """How to measure: on which target (None: where a problem's tensors are), with the backward, as part of a compiled
    graph, and for how many seconds each kernel.
    """

    target: Target | None
    training: bool
    compiled: bool
    seconds: float


def run(asked: Iterable[Asked], wanted: Wanted, *, dry_run: bool) -> None:
    """Measures each problem once, prints every figure, and keeps them unless ``dry_run``.

    Raises what :func:`attnfuse.tuning.figures` raises, and :class:`BadInput` where nothing can be kept.
    """
    # one kernel for each device gives weights: there is nothing to choose
    measurable = (each for each in asked if not each.problem.weights)
    # layers of a model ask the same
    problems = dict.fromkeys((_as_wanted(each.problem, wanted), wanted.target or each.target) for each in measurable)
    found: dict[Target, dict[measured.Case, measured.Measured]] = {}
    shown = []
    with steps(len(problems)) as bar:
        for problem, target in problems:
            words = _words(problem, target)
            figures = measure(problem, target, wanted.seconds, partial(_tell, bar, words))
            found.setdefault(target, {})[measured.case_of(problem)] = as_measured(figures)
            shown.append((words, figures))
            bar.done()
    for words, figures in shown:
        _show(words, figures)
    for target, cases in found.items():
        typer.echo("nothing is kept" if dry_run else f"kept in {measured.keep(target, cases)}")
    if not problems:
        typer.echo("there is no attention to measure")


def _tell(bar: Steps, words: str, what: str) -> None:
    bar.tell(f"{words}: {what}")


def _as_wanted(problem: Problem, wanted: Wanted) -> Problem:
    operands = (problem.query, problem.key, problem.value, *problem.captures)
    query, key, value, *captures = (_asking(each, wanted.training) for each in operands)
    return replace(problem, query=query, key=key, value=value, captures=tuple(captures), compiled=wanted.compiled)


def _asking(operand: Operand, training: bool) -> Operand:
    return replace(operand, requires_grad=training and operand.dtype.is_floating_point)


def _words(problem: Problem, target: Target) -> str:
    query, keys = problem.query, problem.keys
    return f"{describe(problem.spec)}, {name_of(query.dtype)} q{list(query.shape)} of {keys} keys on {target}"


def _show(words: str, figures: Sequence[Figure]) -> None:
    timed = {each.name: each.seconds for each in figures if each.seconds is not None and each.name in kernels()}
    by_model = min((each for each in figures if each.name in kernels()), key=lambda each: each.modelled).name
    fastest = min(timed, key=timed.__getitem__) if timed else "none that runs"
    otherwise = "" if fastest == by_model else f", the model has {by_model}"
    typer.echo(f"{words}: the fastest kernel is {fastest}{otherwise}")
    show_rows(("kernel", "measured", "model", "ratio", ""), map(_row, figures))


def _row(figure: Figure) -> tuple[str, ...]:
    if figure.seconds is None:
        return figure.name, "", _milliseconds(figure.modelled), "", figure.remark
    ratio = f"{figure.seconds / figure.modelled:.2f}" if figure.modelled else ""
    return figure.name, _milliseconds(figure.seconds), _milliseconds(figure.modelled), ratio, figure.remark


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
