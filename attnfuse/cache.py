"""What is measured on a machine is kept in small files that processes share: whole at any time, never in the way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from attnfuse.atomic import replacing
from attnfuse.errors import BadInput

__all__ = ["Kept", "believed", "folder"]

log = logging.getLogger(__name__)

#: Seconds that a writer waits for another.
PATIENCE = 30.0


def folder() -> Path:
    """Where measurements are kept: ``$ATTNFUSE_CACHE``, else ``attnfuse`` in the user's cache directory.

    https://specifications.freedesktop.org/basedir-spec: a relative ``$XDG_CACHE_HOME`` is no place.
    """
    if chosen := os.environ.get("ATTNFUSE_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "attnfuse"


def believed() -> bool:
    """Whether choices may depend on what was measured on this machine: unless ``ATTNFUSE_CALIBRATE=0``."""
    return os.environ.get("ATTNFUSE_CALIBRATE") != "0"


@dataclass(frozen=True)
class Kept:
    """A JSON object in a file, with a checksum. Readers need no lock; writers wait for one another."""

    path: Path

    def read(self) -> dict[str, Any]:
        """What is kept; empty where nothing is, or nothing that can be read. A damaged file is set aside."""
        try:
            return self._decoded()
        except OSError as error:
            log.warning("cannot read %s: %s", self.path, error.strerror or error)
        except ValueError as error:
            return self._repaired_for_reading(str(error))
        return {}

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """What is kept, to be changed in place; it is written when the block ends well. Raises :class:`BadInput`."""
        with self._locked():
            content = self._repaired_for_writing()
            yield content
            with replacing(self.path) as file:
                file.write(_encoded(content))

    def _decoded(self) -> dict[str, Any]:
        try:
            kept = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        if not isinstance(kept, dict) or not isinstance(kept.get("content"), dict):
            raise ValueError("it is no object with content")
        content: dict[str, Any] = kept["content"]
        if kept.get("sha256") != _checksum(content):
            raise ValueError("its checksum is another")
        return content

    def _repaired(self) -> dict[str, Any]:
        """What is kept, by whoever holds the lock."""
        try:
            return self._decoded()
        except ValueError as error:
            aside = self.path.with_suffix(".damaged")
            self.path.replace(aside)
            log.warning("%s is damaged (%s); it is set aside as %s", self.path, error, aside.name)
        return {}

    def _repaired_for_writing(self) -> dict[str, Any]:
        try:
            return self._repaired()
        except OSError as error:
            raise BadInput(f"cannot read {self.path}: {error.strerror or error}") from error

    def _repaired_for_reading(self, reason: str) -> dict[str, Any]:
        try:
            # under the lock, for another process may be putting it right
            with self._locked():
                return self._repaired()
        except (BadInput, OSError) as error:
            log.warning("%s is damaged (%s) and not read; nor can it be set aside: %s", self.path, reason, error)
        return {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise BadInput(f"cannot write {self.path}: another process has held it for {PATIENCE:.0f} s") from error
        except OSError as error:
            raise BadInput(f"cannot write {self.path}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps({"sha256": _checksum(content), "content": content}, indent=1, sort_keys=True).encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
