"""What a person sees: progress on the standard error, tables on the standard output, plain text when piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from attnfuse.errors import Refused
from attnfuse.report import Certificate, Fused, Report, grouped

__all__ = ["Steps", "show_certificate", "show_report", "show_rows", "stage", "steps"]

S = TypeVar("S", bound=Fused | Refused)


@contextmanager
def stage(words: str) -> Iterator[None]:
    """Says that ``words`` is being done, where somebody is watching."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{words} ..."):
        yield


@dataclass(frozen=True)
class Steps:
    """A bar of steps, which is shown where somebody is watching."""

    bar: Progress
    task: TaskID

    def tell(self, words: str) -> None:
        """Says what is being done."""
        self.bar.update(self.task, description=words)

    def done(self) -> None:
        """One step is."""
        self.bar.advance(self.task)


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """A bar of so many steps."""
    console = Console(stderr=True)
    words = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), words)
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        yield Steps(bar, bar.add_task("", total=total))


def show_report(report: Report) -> None:
    """Every site, equal ones on one row: a table for a person, the report's own text for a pipe."""
    if not sys.stdout.isatty():
        typer.echo(str(report))
        return
    if report.fused:
        header = ("sites", "fused", "shape", "kernel", "V lies", "copies", "estimated gain")
        show_rows(header, _counted(report.fused, _fused_row))
    if report.refused:
        show_rows(("sites", "refused because", "remedy", "where"), _counted(report.refused, _refused_row))
    typer.echo(f"attention sites: {len(report.sites)}, fused: {len(report.fused)}, refused: {len(report.refused)}")


def show_certificate(certificate: Certificate) -> None:
    """One line on how a result was verified, or why it was not."""
    if certificate.skipped:
        typer.echo(f"not verified: {certificate.skipped}")
        return
    typer.echo(
        f"verified on {', '.join(certificate.inputs)}: largest error against float64 "
        f"{certificate.fused_max:.2g}, the source's own {certificate.source_max:.2g}"
    )


def show_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table for a person; tab-separated lines, without the header, for a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    # brackets are shapes here, not rich's markup
    Console(markup=False, highlight=False).print(table)


def _fused_row(site: Fused) -> tuple[str, ...]:
    kernel, unfused = site.seconds.get(site.kernel), site.seconds.get("unfused")
    gain = f"{unfused / kernel:.1f}x" if kernel and unfused else ""
    before, after = site.copies
    copies = f"{before} -> {after}" if before or after else ""
    lies = {"d": "[n, d]", "n": "[d, n]"}.get(site.layouts.get("value", ""), "")
    return site.what, site.shape, site.kernel, lies, copies, gain


def _refused_row(site: Refused) -> tuple[str, ...]:
    return site.reason, site.remedy, site.source or site.node


def _counted(sites: Iterable[S], row: Callable[[S], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One row for each group of equal sites, its count in front."""
    return [(str(len(members)), *row(members[0])) for members in grouped(sites)]
