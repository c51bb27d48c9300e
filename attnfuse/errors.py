"""Every way attnfuse says no. Each error is one sentence a user can act on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttnfuseError", "BadInput", "BadProgram", "NoKernel", "NotEquivalent", "Refused"]


class AttnfuseError(Exception):
    """Base of all errors that attnfuse raises on purpose."""


# not frozen: Python writes tracebacks and notes into an exception while it is raised
@dataclass(unsafe_hash=True)
class Refused(AttnfuseError):
    """A place in the graph that is not fused, and why.

    ``reason`` is a sentence, ``node`` the graph node's name, ``source`` the user's line as
    ``file:line, code`` (empty when the graph carries none), ``remedy`` what would make it fuse.
    """

    reason: str
    node: str = ""
    source: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        # copying and pickling an exception go through its args
        super().__init__(self.reason, self.node, self.source, self.remedy)

    def __str__(self) -> str:
        where = f" [{self.node}{' at ' + self.source if self.source else ''}]" if self.node else ""
        return f"{self.reason}{where}{'; ' + self.remedy if self.remedy else ''}"


class BadProgram(AttnfuseError):
    """A score program or an attention spec that is not well formed."""


class NoKernel(AttnfuseError):
    """No registered kernel can compute a spec on a target; the message lists each one's reasons."""


class NotEquivalent(AttnfuseError):
    """A rewritten program does not compute what its source computes."""


class BadInput(AttnfuseError):
    """A file, option or argument that cannot be used; nothing was written."""
