"""The command line: runs a command and turns whatever happens into one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from attnfuse.commands import app
from attnfuse.exits import BUG, exit_of

__all__ = ["main", "run"]


def main() -> None:
    """The ``attnfuse`` command."""
    # torch warns of its own internals while it reads and copies programs
    warnings.filterwarnings("ignore", module=r"torch\.|copyreg")
    # and logs that a CUDA toolkit has no GPU beside it, which says nothing of the program
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of ``attnfuse`` with ``arguments``; an error is one line on the standard error."""
    try:
        code = int(app(list(arguments), prog_name="attnfuse", standalone_mode=False) or 0)
        # typer turns Ctrl-C into its exit code, without a word
        return _failed(KeyboardInterrupt()) if code == exit_of(KeyboardInterrupt()).code else code
    except SystemExit:
        # how typer answers a reader that has gone
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the last door: every error is one line
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Says what went wrong in one line, and returns the exit code."""
    end = exit_of(error)
    if end is BUG and os.environ.get("ATTNFUSE_TRACEBACK"):
        traceback.print_exception(error)
    match error:
        case typer.TyperException():
            message = error.format_message()
        case typer.Abort() | KeyboardInterrupt():
            message = end.meaning
        case _ if end is BUG:
            message = f"internal error, please report it: {type(error).__name__}: {error}"
        case _:
            message = str(error)
    typer.echo(f"attnfuse: {' '.join(message.split())}", err=True)
    return end.code
