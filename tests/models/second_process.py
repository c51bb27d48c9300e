"""Trains a compiled model for one step in a process of its own and saves what came of it; test_cache.py runs it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from tests.models.doors import compiled
from tests.models.gradients import Gradients, gradients
from tests.models.zoo import MODELS

__all__ = ["Outcome", "step"]


@dataclass(frozen=True)
class Outcome:
    """One step's gradients, and how often compiled code was found in the caches and how often not."""

    gradients: Gradients
    hits: int
    misses: int

    @staticmethod
    def load(path: Path) -> Outcome:
        return Outcome(**torch.load(path))


def step(name: str, padding: str, path: Path) -> None:
    """Saves the :class:`Outcome` of one step of the model, compiled by Inductor after us."""
    module = MODELS[name].make(torch.float32).train()
    found = gradients(module, MODELS[name].feed(padding), compiled(module, inner="inductor"))
    cache: Mapping[str, int] = counters["aot_autograd"]
    outcome = {"gradients": found, "hits": cache["autograd_cache_hit"], "misses": cache["autograd_cache_miss"]}
    torch.save(outcome, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    step(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
