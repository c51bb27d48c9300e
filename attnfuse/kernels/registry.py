"""Which kernels exist: attnfuse's own, and those of other packages.

A third party adds kernels through the entry point group ``attnfuse.kernels``: each entry names a module
whose import runs ``@kernel``, or a :class:`Kernel` subclass. A package that cannot be loaded is left out, and a
warning names it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType, ModuleType
from typing import TypeVar

from attnfuse.errors import BadInput
from attnfuse.kernels.kernel import Kernel
from attnfuse.version import __version__

__all__ = ["UNFUSED", "kernel", "kernels", "lookup", "origin", "registered"]

log = logging.getLogger(__name__)

#: The name that the unfused graph has among the candidates.
UNFUSED = "unfused"
GROUP = "attnfuse.kernels"

_KERNELS: dict[str, Kernel] = {}
#: The package, with its version, that a kernel came from; none for kernels that were registered otherwise.
_PACKAGES: dict[str, str] = {}
K = TypeVar("K", bound=type[Kernel])


def kernel(cls: K) -> K:
    """Class decorator: registers one instance of a :class:`Kernel` under its name. Raises :class:`BadInput`."""
    known = _KERNELS.get(cls.name)
    if cls.name == UNFUSED or (known is not None and type(known).__qualname__ != cls.__qualname__):
        raise BadInput(f"there already is a kernel called {cls.name!r}")
    _KERNELS[cls.name] = cls()
    return cls


def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name: attnfuse's own in the order of preference, then those of entry points."""
    _load_entry_points()
    return MappingProxyType(_KERNELS)


def lookup(name: str) -> Kernel:
    """The kernel of that name. Raises :class:`BadInput`, naming those there are."""
    if name in _KERNELS:
        return _KERNELS[name]
    if name in kernels():
        return _KERNELS[name]
    raise BadInput(f"there is no kernel {name!r}; there are {', '.join(_KERNELS)}")


def origin(each: Kernel) -> str | None:
    """Whose kernel that is: a package and its version, or a module; None for attnfuse's own."""
    module = type(each).__module__
    return _PACKAGES.get(each.name) or (None if module.startswith("attnfuse.") else module)


def registered() -> str:
    """A hash of this version and of every kernel and where it comes from, for cache keys: 16 hexadecimal digits."""
    lines = [f"{name} {_PACKAGES.get(name, '')}" for name in sorted(kernels())]
    return hashlib.sha256("\n".join([__version__, *lines]).encode()).hexdigest()[:16]


# --- other packages ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _load_entry_points() -> None:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        before = set(_KERNELS)
        try:
            _load(entry)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - importing somebody else's code may raise anything
            for name in set(_KERNELS) - before:
                del _KERNELS[name]
            reason = f"{type(error).__name__}: {error}"
            log.warning(
                "kernels of %s are left out, since %s cannot be loaded: %s", _package(entry), entry.name, reason
            )
        _PACKAGES.update(dict.fromkeys(set(_KERNELS) - before, _package(entry)))


def _load(entry: EntryPoint) -> None:
    loaded = entry.load()
    if isinstance(loaded, type) and issubclass(loaded, Kernel):
        if type(_KERNELS.get(loaded.name)) is not loaded:
            kernel(loaded)
    elif not isinstance(loaded, ModuleType):
        raise TypeError(f"{entry.value} is neither a module nor a subclass of attnfuse.Kernel")


def _package(entry: EntryPoint) -> str:
    """The name and version of the package that has the entry point."""
    found = getattr(entry, "dist", None)
    return f"{found.name} {found.version}" if found is not None else entry.name
