"""WHAT a random attention computes: sizes and named parts, from which its AttentionSpec and its inputs follow.

A part's program is the text of a score program in which ``{name}`` stands for a captured tensor, so that
the expected spec is written down here once, in the project's own notation, and independently of any spelling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from attnfuse.form import ABSORBING, Form
from attnfuse.score import Const, Expr, S, apply, parse, rewrite
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["WEIGHTS", "Arg", "Inputs", "Part", "Recipe", "Sizes"]

FINFO_MIN = torch.finfo(torch.float32).min

#: What makes weights of logits, and the program of one weight where no other logit has a say in it.
WEIGHTS = {"softmax": "", "safe softmax": "", "sigmoid": "sigmoid(s)", "squared relu": "relu(s) * relu(s)"}


@dataclass(frozen=True)
class Sizes:
    """Query ``[*batch, heads, rows, depth]``, key ``[*batch, kv_heads, keys, depth]``, value ``[..., value_depth]``."""

    batch: tuple[int, ...] = (2,)
    heads: int = 4
    kv_heads: int = 4
    rows: int = 5
    keys: int = 7
    depth: int = 8
    value_depth: int = 6

    def along(self, axis: str) -> int:
        """The size of a score axis: ``b0``, ..., ``h``, ``m``, ``n``."""
        named = {"h": self.heads, "m": self.rows, "n": self.keys}
        return named[axis] if axis in named else self.batch[int(axis[1:])]


@dataclass(frozen=True)
class Arg:
    """A captured tensor: the score axes it varies along (``b``: every batch axis); float, bool or int64."""

    name: str
    axes: tuple[str, ...]
    dtype: str = "float"


@dataclass(frozen=True)
class Part:
    """A bias or a mask: which words of the vocabulary spell it, its program, what it reads, and its constant."""

    word: str
    program: str
    args: tuple[Arg, ...] = ()
    value: int = 0


@dataclass(frozen=True)
class Inputs:
    """Query, key, value, and captures by name; a capture has the rank of the scores, size 1 where it broadcasts."""

    query: Tensor
    key: Tensor
    value: Tensor
    captures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Operands, then captures."""
        return (self.query, self.key, self.value, *self.captures.values())

    def leaves(self) -> Inputs:
        """The same data; what is floating-point asks for a gradient."""
        for tensor in self.tensors:
            tensor.requires_grad_(tensor.is_floating_point())
        return self

    def to(self, dtype: torch.dtype) -> Inputs:
        """Floating-point tensors in ``dtype``, the others as they are."""
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.captures.items()}
        return Inputs(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), cast)


@dataclass(frozen=True)
class Recipe:
    """``where(keep, softcap(scale * s) + bias, fill)``, or ``... + where(keep, 0, fill)`` where ``added``; a sink.

    ``weights`` names what makes weights of that: a key of :data:`WEIGHTS`. Only a softmax has fills and sinks.
    """

    sizes: Sizes = Sizes()
    scale: float | str | None = None
    softcap: float | None = None
    biases: tuple[Part, ...] = ()
    masks: tuple[Part, ...] = ()
    fill: float = float("-inf")
    added: bool = False
    sink: bool = False
    weights: str = "softmax"

    @property
    def args(self) -> tuple[Arg, ...]:
        """Captured tensors in the order a spelling takes them."""
        scale = (Arg(self.scale, ()),) if isinstance(self.scale, str) else ()
        sink = (Arg("sinks", ("h",)),) if self.sink else ()
        return (*scale, *(a for part in (*self.biases, *self.masks) for a in part.args), *sink)

    def spec(self, dtype: torch.dtype = torch.float32) -> AttentionSpec:
        """The canonical spec, with captures in the order of :attr:`args` and floats in ``dtype``."""
        keep = tuple(self._parse(part.program) for part in self.masks)
        bias = tuple(self._parse(part.program) for part in self.biases)
        # a fill that does not swallow every score it is added to is a bias like any other
        if keep and self.added and self.fill > ABSORBING:
            bias, keep = (*bias, apply("where", reduce(_both, keep), Const(0.0), Const(self.fill))), ()
        # adding -inf and choosing it are the same, gradient included
        added = self.added and bool(keep) and self.fill > float("-inf")
        form = Form(self._scale(), self.softcap, bias, keep, self.fill if keep else float("-inf"), added)
        return AttentionSpec(
            score=form.expr() if self.is_softmax else self._weight(form),
            normaliser="softmax" if self.is_softmax else "none",
            empty_rows="zero" if self.weights == "safe softmax" else "nan",
            sink=self._parse("{sinks}") if self.sink else None,
            captures=tuple(Captured(self._axes(arg), _dtype_name(arg, dtype)) for arg in self.args),
            batch=len(self.sizes.batch),
        )

    def inputs(self, seed: int = 0, magnitude: float = 1.0, empty_rows: bool = False) -> Inputs:
        """Random float32 data; boolean captures drop about a third, and whole rows of keys where ``empty_rows``."""
        random = torch.Generator().manual_seed(seed)
        s, batch = self.sizes, self.sizes.batch
        shapes = (s.heads, s.rows, s.depth), (s.kv_heads, s.keys, s.depth), (s.kv_heads, s.keys, s.value_depth)
        query, key, value = (torch.randn(*batch, *shape, generator=random) for shape in shapes)
        captures = {arg.name: self._capture(arg, random, empty_rows) for arg in self.args}
        return Inputs(query * magnitude, key, value, captures)

    def _capture(self, arg: Arg, random: torch.Generator, empty_rows: bool) -> Tensor:
        axes = self._axes(arg)
        shape = [self.sizes.along(axis) if axis in axes else 1 for axis in self._score_axes()]
        if arg.dtype == "float":
            return torch.randn(shape, generator=random)
        if arg.name.endswith("_ids"):
            return torch.randint(0, 3, shape, generator=random)
        keep = torch.rand(shape, generator=random) < 2 / 3
        if empty_rows and keep.shape[0]:
            keep[-1] = False
        return keep if arg.dtype == "bool" else keep.long()

    def _score_axes(self) -> tuple[str, ...]:
        return (*(f"b{i}" for i in range(len(self.sizes.batch))), "h", "m", "n")

    def _axes(self, arg: Arg) -> tuple[str, ...]:
        return tuple(axis for axis in self._score_axes() if axis in arg.axes or (axis[0] == "b" and "b" in arg.axes))

    @property
    def is_softmax(self) -> bool:
        """Whether a row's weights add up to one."""
        return self.weights in ("softmax", "safe softmax")

    def _weight(self, form: Form) -> Expr:
        """The weight of a score without a softmax: zero behind a mask."""
        logit = replace(form, keep=(), fill=float("-inf"), added=False).expr()
        weight = rewrite(parse(WEIGHTS[self.weights]), lambda part: logit if part == S else part)
        return apply("where", reduce(_both, form.keep), weight, Const(0.0)) if form.keep else weight

    def _scale(self) -> Expr:
        match self.scale:
            case None:
                return Const(1.0)
            case str():
                return self._parse(f"{{{self.scale}}}")
            case number:
                return Const(number)

    def _parse(self, program: str) -> Expr:
        slots = {arg.name: f"t{slot}" for slot, arg in enumerate(self.args)}
        return parse(program.format(**slots))

    def __iter__(self) -> Iterator[Part]:
        yield from self.biases
        yield from self.masks


def _both(left: Expr, right: Expr) -> Expr:
    return apply("and", left, right)


def _dtype_name(arg: Arg, dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if arg.dtype == "float" else arg.dtype


# --- parts ------------------------------------------------------------------------------------------


def causal(offset: int = 0) -> Part:
    return Part("causal", f"n <= m + {offset}" if offset else "n <= m", value=offset)


def window(offset: int) -> Part:
    """Key ``n`` is kept when ``n >= m + offset``."""
    return Part("window", f"n >= m + {offset}" if offset else "n >= m", value=offset)


def padding(dtype: str = "bool") -> Part:
    program = "{padding}" if dtype == "bool" else "{padding} != 0"
    return Part(f"padding_{dtype}", program, (Arg("padding", ("b", "n"), dtype),))


def allowed(*axes: str) -> Part:
    """A mask that the caller made, for example ``allowed("m", "n")``."""
    return Part("allowed_" + "".join(axes), "{allowed}", (Arg("allowed", axes, "bool"),))


def document() -> Part:
    ids = Arg("row_ids", ("b", "m"), "int64"), Arg("key_ids", ("b", "n"), "int64")
    return Part("document", "{row_ids} == {key_ids}", ids)


def bias(*axes: str) -> Part:
    return Part("bias_" + "".join(axes), "{bias}", (Arg("bias", axes),))


def alibi_keys() -> Part:
    return Part("alibi_keys", "{slopes} * float(n)", (Arg("slopes", ("h",)),))


def alibi_distance() -> Part:
    return Part("alibi_distance", "{slopes} * float(n - m)", (Arg("slopes", ("h",)),))
