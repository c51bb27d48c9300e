"""What can be asked of a rewrite. Every door takes these, by the same names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

from attnfuse.errors import BadInput
from attnfuse.kernels import Numerics, lookup
from attnfuse.passes.certify import Effort
from attnfuse.target import Target

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How to rewrite. Each is a keyword of every door.

    ``target``: where the result will run, default this graph's device. ``kernel``: this one or none.
    ``numerics``: "faithful" or "fast" (:data:`attnfuse.kernels.Numerics`). ``portable``: ATen calls only, so that
    the result loads without attnfuse. ``certify``: how much to replay, "full", "quick" or "off". ``profit``:
    False fuses even where the graph as it is is estimated faster. ``compiled``: whether the result will be compiled,
    as the graph as it is would be; it says what a fusion is compared with. ``print_after``: a stage, or "all".
    ``fp8_attention``: query, key, value and weights may be rounded to float8 where that is estimated faster, as the
    report then says.
    """

    target: Target | str | None = None
    kernel: str | None = None
    numerics: Numerics = "faithful"
    portable: bool = False
    certify: Effort = "quick"
    profit: bool = True
    compiled: bool = True
    print_after: str | None = None
    fp8_attention: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("numerics", get_args(Numerics)), ("certify", get_args(Effort))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.kernel is not None:
            lookup(self.kernel)
        if isinstance(self.target, str):
            object.__setattr__(self, "target", Target.parse(self.target))

    @staticmethod
    def of(given: dict[str, Any]) -> Options:
        """Options from keywords. Raises :class:`BadInput`, naming those there are, for an unknown one."""
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise BadInput(f"unknown option {name!r}; the options are {', '.join(known)}")
        return Options(**given)
