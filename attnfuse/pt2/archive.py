"""Exported programs on disk: read with suspicion, written whole or not at all."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram

from attnfuse.atomic import replacing
from attnfuse.errors import BadInput
from attnfuse.pt2.trust import only_tensors, threat

__all__ = ["load", "save"]

_REMEDY = "; pass --trust-input if you know who made it"
_UNKNOWN_REMEDY = "; pass --import with the library that defines it"
#: The loggers on the way of ``torch.export.load``; a filter acts on one logger, not on those below it.
_TORCH_LOGGERS = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


def load(path: Path, *, trust_input: bool = False) -> ExportedProgram:
    """The program in a ``.pt2``. Loading runs no code of the file's, unless ``trust_input``.

    Raises :class:`BadInput`, in one sentence, for every file that cannot be used.
    """
    with _opened(path) as archive:
        _check_integrity(path, archive)
        if not trust_input:
            _check_trust(path, archive)
    with ExitStack() as stack:
        if not trust_input:
            stack.enter_context(only_tensors())
        return _load(path, stack.enter_context(_overheard()))


def save(program: ExportedProgram, path: Path, notes: Mapping[str, str]) -> None:
    """Write ``program`` to ``path``, with ``notes`` (names and texts) as the archive's extra files.

    ``path`` is replaced as a whole or not touched. Raises :class:`BadInput`.
    """
    with replacing(path) as stream:
        torch.export.save(program, stream, extra_files=dict(notes))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            yield archive
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise BadInput(_why_no_zip(path)) from error


def _why_no_zip(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(4)
    if not head:
        return f"{path} is empty"
    if head.startswith(b"PK"):
        return f"{path} is truncated or damaged: its table of contents is missing"
    return f"{path} is not a .pt2: not a zip archive"


def _check_integrity(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    records = {name.partition("/")[2] for name in names}
    if "archive_format" not in records and "version" not in names:
        raise BadInput(f"{path} is a zip archive but not a .pt2")
    if any(record.startswith("data/aotinductor/") for record in records):
        raise BadInput(f"{path} is a compiled package, not an exported program")
    if len(set(names)) < len(names):
        raise BadInput(f"{path} is damaged: it holds two members of one name")
    damaged = archive.testzip()
    if damaged is not None:
        raise BadInput(f"{path} is damaged: {damaged} does not match its checksum")


def _check_trust(path: Path, archive: zipfile.ZipFile) -> None:
    try:
        found = threat(archive)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: its program is not JSON") from error
    if found is not None:
        raise BadInput(f"{path} would run code when loaded: {found}{_REMEDY}")


def _load(path: Path, heard: list[BaseException]) -> ExportedProgram:
    try:
        # an open file, because torch warns of a path that does not end in .pt2
        with path.open("rb") as stream:
            return torch.export.load(stream)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path} would run code when loaded: {_pickled(error)}{_REMEDY}") from error
    except Exception as error:  # torch raises anything at a malformed program, TypeError included
        reason = _root(heard[0] if heard else error)
        remedy = _UNKNOWN_REMEDY if re.search(r"not registered|failed to resolve", reason) else ""
        raise BadInput(f"{path} cannot be loaded by torch {torch.__version__}: {reason}{remedy}") from error


def _pickled(error: pickle.UnpicklingError) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it pickles {named[1]}" if named else "it pickles more than tensors"


def _root(error: BaseException) -> str:
    """The first sentence of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    sentence = re.split(r"\.?\s*\n|\. ", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence[:160].rstrip('.')}"


@contextmanager
def _overheard() -> Iterator[list[BaseException]]:
    """The exceptions that torch would have logged: it logs the reason, and raises a pointer to its log."""
    heard: list[BaseException] = []

    def listen(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            heard.append(record.exc_info[1])
        return False

    loggers = [logging.getLogger(name) for name in _TORCH_LOGGERS]
    for logger in loggers:
        logger.addFilter(listen)
    try:
        yield heard
    finally:
        for logger in loggers:
            logger.removeFilter(listen)
