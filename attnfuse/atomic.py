"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from attnfuse.errors import BadInput

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[io.FileIO]:
    """A binary file that becomes ``path`` when the block ends well, and leaves nothing behind when it does not.

    It is written beside ``path``, flushed to the disk and renamed. A failed write (a full disk) is raised
    when the block ends, and so is Ctrl-C: see :class:`_Steady`. Raises :class:`BadInput`.
    """
    # through a link to what it stands for
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise BadInput(f"cannot write {path}: it is not an ordinary file")
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _interrupts_held(), _Steady(draft, "xb") as stream:
            yield stream
            if stream.failure is not None:
                raise stream.failure
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


class _Steady(io.FileIO):
    """A file whose writes never raise; the first failure is kept in ``failure`` and later writes are dropped.

    torch's archive writer is C++ that calls back here, and an exception out of that call ends the process.
    """

    failure: OSError | None = None

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]  # any buffer, as the base takes
        view = memoryview(data).cast("B")
        try:
            while view and self.failure is None:
                view = view[super().write(view) :]
        except OSError as error:
            self.failure = error
        return len(data)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C takes effect when the block ends, for the same reason as in :class:`_Steady`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
