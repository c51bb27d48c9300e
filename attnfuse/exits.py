"""How a command can end: exit codes, their meaning in ``--help``, and the errors that lead to them."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from attnfuse.errors import BadInput, BadProgram, NoKernel, NotEquivalent, Refused

__all__ = ["BUG", "EXITS", "Exit", "exit_of", "table"]


@dataclass(frozen=True)
class Exit:
    """An exit code, what it means, and the errors that end with it."""

    code: int
    meaning: str
    errors: tuple[type[BaseException], ...] = ()


DONE = Exit(0, "done")
BUG = Exit(1, "a bug in attnfuse; ATTNFUSE_TRACEBACK=1 shows where", (Exception,))

#: Every way to end, in the order of their codes.
EXITS = (
    DONE,
    BUG,
    Exit(2, "a command or option that does not exist, or is used wrongly", (typer.TyperException,)),
    Exit(3, "a file or value that cannot be used; nothing was written", (BadInput, BadProgram)),
    Exit(4, "no kernel can compute what was asked for; nothing was written", (NoKernel, Refused)),
    Exit(5, "the rewritten program did not verify; nothing was written", (NotEquivalent,)),
    Exit(130, "interrupted; nothing was written", (KeyboardInterrupt, typer.Abort)),
)


def exit_of(error: BaseException) -> Exit:
    """The way to end that ``error`` leads to; an error nobody foresaw is a bug."""
    return next((each for each in EXITS if each is not BUG and isinstance(error, each.errors)), BUG)


def table() -> str:
    """The codes and their meanings, a line each."""
    return "\n".join(f"{each.code:>5}  {each.meaning}" for each in EXITS)
