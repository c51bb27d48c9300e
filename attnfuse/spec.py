"""WHAT attention computes: one frozen value, free of any graph, device or tensor.

Shapes, in the order every part of attnfuse keeps them (``*B`` is ``spec.batch`` batch dimensions)::

    query [*B, H, M, D]   key [*B, Hkv, N, D]   value [*B, Hkv, N, Dv]   out [*B, H, M, Dv]

with ``H % Hkv == 0``; query head ``h`` reads key/value head ``h // (H // Hkv)`` (grouped-query
attention). A batch dimension of key or value may be 1 where the query's is not.

    score  = query . key                                    (one number for each *B, h, m, n)
    logit  = spec.score(score)
    weight = exp(logit) / (sum over n of exp(logit) + exp(spec.sink))
    out    = sum over n of dropout(spec.weight(weight)) * value

A row whose logits, the sink's included, are all -inf is *empty*. Its weights are NaN, as in the written-out
program, unless ``spec.empty_rows`` says "zero", as ``scaled_dot_product_attention`` and ``_safe_softmax`` have it.

With ``spec.normaliser`` "none" the logit is the weight: sigmoid attention, ReLU^2, the masked product of linear
attention. A key is then masked by a logit of zero, no row is empty, and there is no sink.

Scores of half types may be rounded to that type, as the written-out program rounds them, unless
``spec.exact_scores``: then they are float32, as in ``scaled_dot_product_attention``.

Operands may be float8 tensors, whose scales are factors of the programs: those of query and key of ``score``, that of
value of ``weight``. ``out`` is of value's type, or where that is a float8 of ``spec.out_dtype``. Weights may be rounded
to ``spec.weight_dtype`` before they multiply value, each in units of the largest of its row, as a program rounds them
that quantises its weights.

Where the weights ``[*B, H, M, N]`` are the result there is no value and nothing happens to them: ``spec.weight`` is
``p``, and they are of ``spec.out_dtype``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from attnfuse.errors import BadProgram
from attnfuse.score import Apply, Capture, Expr, Index, P, Prob, S, Score, Symbol, parse, text, walk

__all__ = ["FLOAT8", "SCORE_AXES", "AttentionSpec", "Captured", "EmptyRows", "Normaliser", "axes_of"]

#: The axes of a score after its batch axes.
SCORE_AXES = ("h", "m", "n")

#: The float8 types of numbers, by torch's names: each of their values is one of every wider type too.
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")

#: How a row of logits becomes weights.
Normaliser = Literal["softmax", "none"]
#: The weights of a row whose logits are all -inf.
EmptyRows = Literal["nan", "zero"]


@dataclass(frozen=True)
class Captured:
    """A tensor the program reads: the score axes it varies along, and its dtype (``"bool"``, ``"float32"``...).

    The tensor itself has the rank of the scores, ``[*B, H, M, N]``, with size 1 along every axis that
    is not named in ``axes``: it broadcasts.
    """

    axes: tuple[str, ...]
    dtype: str

    @property
    def kind(self) -> str:
        """What the tensor holds, as programs know it: ``"bool"``, ``"int"`` or ``"float"``."""
        return "bool" if self.dtype == "bool" else "int" if self.dtype.startswith(("int", "uint")) else "float"


@dataclass(frozen=True)
class AttentionSpec:
    """One attention, as the module docstring defines it. Raises :class:`BadProgram` when ill-formed."""

    score: Expr = S
    weight: Expr = P
    sink: Expr | None = None
    dropout: float = 0.0
    captures: tuple[Captured, ...] = ()
    batch: int = 1
    symbols: int = 0
    normaliser: Normaliser = "softmax"
    empty_rows: EmptyRows = "nan"
    exact_scores: bool = False
    weight_dtype: str | None = None
    out_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 0 or self.symbols < 0:
            raise BadProgram(f"{self.batch} batch dimensions, {self.symbols} symbolic sizes: neither may be negative")
        for captured in self.captures:
            if captured.axes != tuple(axis for axis in self.axes if axis in captured.axes):
                raise BadProgram(f"a capture along {captured.axes}; its axes must be among {self.axes}, in that order")
        self._check("score", self.score, forbidden=(Prob,))
        self._check("weight", self.weight, forbidden=(Score,))
        if self.sink is not None:
            self._check("sink", self.sink, forbidden=(Score, Prob))
            if "n" in axes_of(self.sink, self.captures):
                raise BadProgram(f"the sink {text(self.sink)!r} varies along the keys")
        if not 0.0 <= self.dropout <= 1.0:
            raise BadProgram(f"dropout probability {self.dropout} is not between 0 and 1")
        self._check_normaliser()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # launches are looked up by their spec, and a hash walks its programs
        return hash(tuple(self.__getstate__().values()))

    def __getstate__(self) -> dict[str, Any]:
        # another process hashes texts otherwise
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _check_normaliser(self) -> None:
        for name, allowed in (("normaliser", get_args(Normaliser)), ("empty_rows", get_args(EmptyRows))):
            if getattr(self, name) not in allowed:
                raise BadProgram(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.normaliser == "none" and (self.sink is not None or self.empty_rows != "nan"):
            raise BadProgram("without a softmax there are neither sinks nor empty rows")
        if self.weight_dtype is not None and (self.weight_dtype not in FLOAT8 or self.normaliser == "none"):
            raise BadProgram(f"weights of a softmax may be one of {', '.join(FLOAT8)}, not {self.weight_dtype!r}")

    def _check(self, what: str, program: Expr, forbidden: tuple[type, ...]) -> None:
        for part in walk(program):
            match part:
                case Capture(slot) if slot >= len(self.captures):
                    raise BadProgram(f"the {what} program reads t{slot}, of {len(self.captures)} captures")
                case Symbol(slot) if slot >= self.symbols:
                    raise BadProgram(f"the {what} program reads z{slot}, of {self.symbols} sizes")
                case Index(axis) if axis not in self.axes:
                    raise BadProgram(f"the {what} program reads index {axis}; there are {', '.join(self.axes)}")
                case _ if isinstance(part, forbidden):
                    raise BadProgram(f"the {what} program reads {text(part)!r}")

    @property
    def axes(self) -> tuple[str, ...]:
        """The score's axes in order: ``("b0", "h", "m", "n")`` for ``batch == 1``."""
        return (*(f"b{i}" for i in range(self.batch)), *SCORE_AXES)

    def to_text(self) -> str:
        """One line of JSON, with programs in their text form; the op carries it.

        The last fields, from the normaliser on, are left out where they have their defaults.
        """
        facts = ("normaliser", "empty_rows", "exact_scores", "weight_dtype", "out_dtype")
        unusual = {name: getattr(self, name) for name in facts if getattr(self, name) != getattr(AttentionSpec, name)}
        return json.dumps(
            {
                "score": text(self.score),
                "weight": text(self.weight),
                "sink": None if self.sink is None else text(self.sink),
                "dropout": self.dropout,
                "captures": [f"{c.dtype}[{','.join(c.axes)}]" for c in self.captures],
                "batch": self.batch,
                "symbols": self.symbols,
                **unusual,
            }
        )

    @staticmethod
    def from_text(source: str) -> AttentionSpec:
        """The inverse of :meth:`to_text`. Raises :class:`BadProgram`."""
        try:
            raw = json.loads(source)
            return AttentionSpec(
                score=parse(raw["score"]),
                weight=parse(raw["weight"]),
                sink=None if raw["sink"] is None else parse(raw["sink"]),
                dropout=float(raw["dropout"]),
                captures=tuple(map(_captured, raw["captures"])),
                batch=int(raw["batch"]),
                symbols=int(raw["symbols"]),
                normaliser=raw.get("normaliser", "softmax"),
                empty_rows=raw.get("empty_rows", "nan"),
                exact_scores=bool(raw.get("exact_scores", False)),
                weight_dtype=raw.get("weight_dtype"),
                out_dtype=raw.get("out_dtype"),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadProgram(f"not an attention spec: {source[:80]!r} ({error})") from None


def _captured(source: str) -> Captured:
    dtype, _, axes = source.rstrip("]").partition("[")
    return Captured(tuple(filter(None, axes.split(","))), dtype)


def axes_of(program: Expr, captures: Iterable[Captured]) -> frozenset[str]:
    """The axes along which a program's value can vary, taking ``s`` and ``p`` to vary along all."""
    known = tuple(captures)
    found: set[str] = set()
    for part in walk(program):
        match part:
            case Index(axis):
                found.add(axis)
            case Capture(slot):
                found.update(known[slot].axes)
            case Score() | Prob():
                found.update((*SCORE_AXES, *(a for c in known for a in c.axes)))
            case Apply() | Symbol():
                pass
    return frozenset(found)
