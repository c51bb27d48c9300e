"""A kernel whose price favours one layout, as kernels of other devices do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from torch import Tensor

from attnfuse.kernels import Problem, registry
from attnfuse.kernels.cpu.blocked import Blocked
from attnfuse.operands import Operands
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

#: How many times as long it takes with an operand in each layout. For value: float8 on one H200.
Factors = dict[str, dict[str, float]]
TRANSPOSED_VALUE: Factors = {"value": {"d": 2.54, "n": 1.0}}


@dataclass
class Picky:
    """``picky(factors, seconds)`` registers a kernel and returns its name; ``seen`` are the strides its values had."""

    monkeypatch: pytest.MonkeyPatch
    seen: list[dict[str, tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, factors: Factors = TRANSPOSED_VALUE, seconds: float = 1.0) -> str:
        seen = self.seen

        class Kernel(Blocked):
            """Computes as `blocked` does, and says that it takes longer with some layouts."""

            name: ClassVar[str] = "picky"
            devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

            def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
                return ()

            def cost(self, problem: Problem, target: Target) -> float:
                found = seconds
                for name, by_layout in factors.items():
                    found *= by_layout[getattr(problem, name).minor]
                return found

            def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
                seen.append({name: getattr(operands, name).stride() for name in ("query", "key", "value")})
                return super().run(spec, operands)

        self.monkeypatch.setitem(registry._KERNELS, "picky", Kernel())
        return "picky"

    def layouts(self, operand: str) -> set[str]:
        """How an operand lay whenever the kernel ran."""
        return {"n" if each[operand][-2] == 1 else "d" for each in self.seen}


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Picky:
    return Picky(monkeypatch)
