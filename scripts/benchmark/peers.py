"""Who competes. A peer prepares a case and returns the call that is timed; None where it cannot express it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnfuse.backend import attnfuse
from benchmark.byhand import FLEX, SDPA, Tensors
from benchmark.cases import Case

__all__ = ["OURS", "PEERS", "Call"]

Call = Callable[[], Tensor]
OURS = "attnfuse"


def _eager(case: Case, given: Tensors) -> Call:
    program = case.variant.program
    return lambda: program(**given)


def _compiled(backend: Any) -> Callable[[Case, Tensors], Call]:
    def prepare(case: Case, given: Tensors) -> Call:
        program = torch.compile(case.variant.program, backend=backend, fullgraph=True, dynamic=False)
        return lambda: program(**given)

    return prepare


def _by_hand(table: dict[str, Any]) -> Callable[[Case, Tensors], Call | None]:
    def prepare(case: Case, given: Tensors) -> Call | None:
        if case.name not in table:
            return None
        attend = table[case.name](given)
        return lambda: attend(given["query"], given["key"], given["value"])

    return prepare


#: In the order of the table's columns, which is also the order they are run in.
PEERS: dict[str, Callable[[Case, Tensors], Call | None]] = {
    "eager": _eager,
    "inductor": _compiled("inductor"),
    "SDPA by hand": _by_hand(SDPA),
    "flex by hand": _by_hand(FLEX),
    # the function, not its name: it need not be installed
    OURS: _compiled(attnfuse),
}
