"""Provisional."""

from __future__ import annotations

from attnfuse.kernels.problem import Problem
from attnfuse.target import Target


def unfused(problem: Problem, target: Target) -> float:
    return 1.0


def blocked(problem: Problem) -> float:
    return 0.5


def sdpa(problem: Problem) -> float:
    return 0.4
