"""HOW an attention is written: a recipe and a spelling as the source of one Python function.

The result is text, so that a failing example is its own minimal repro, and an importable file, so that Dynamo
and reports see real source lines.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.property import vocabulary as words
from tests.property.menu import Spelling
from tests.property.recipe import Inputs, Part, Recipe
from tests.support.doors import as_module

__all__ = ["Spelled", "spell"]

_HEADER = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
_FOLDER = Path(tempfile.mkdtemp(prefix="spelled-"))


@dataclass(frozen=True)
class Spelled:
    """One spelling of one recipe: the function's source, and how its arguments are made of canonical inputs."""

    recipe: Recipe
    spelling: Spelling
    source: str

    @cached_property
    def module(self) -> nn.Module:
        """The function as a module."""
        return as_module(_import(self.source))

    def arguments(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """``inputs`` in the shapes in which this spelling takes them, captures after query, key and value."""
        outside = words.ARRIVE[self.spelling.arrive].outside
        operands = zip(outside, (inputs.query, inputs.key, inputs.value), strict=True)
        return (*(_evaluate(way, x=x) for way, x in operands), *self._captures(inputs))

    def leave(self, out: Tensor) -> Tensor:
        """What this spelling returns where attention's result is ``out [*batch, H, M, Dv]``."""
        if words.WEIGHTED[self.spelling.weighted].axes == "bmhe":
            out = out.transpose(1, 2)
        sizes = dict(zip("BHME", (out.shape[0], *out.shape[-3:]), strict=True))
        return _evaluate(words.LEAVE[self.spelling.leave].replace("out", "x"), x=out, **sizes)

    def _captures(self, inputs: Inputs) -> Iterator[Tensor]:
        ways = {"sinks": "{x}.flatten()", "temperature": "{x}.reshape(())"}
        for part, word in zip(self.recipe, self.spelling.terms, strict=True):
            ways |= words.TERMS[part.word][word].outside
        for arg in self.recipe.args:
            yield _evaluate(ways.get(arg.name, "{x}"), x=inputs.captures[arg.name])


def _import(source: str) -> Callable[..., Tensor]:
    file = _FOLDER / f"spelled_{hashlib.sha256(source.encode()).hexdigest()[:12]}.py"
    file.write_text(_HEADER + source, encoding="utf-8")
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    sys.modules[file.stem] = module
    # as an import would, but that what is used once is not written as bytecode
    exec(compile(_HEADER + source, file, "exec"), module.__dict__)
    function: Callable[..., Tensor] = module.attention
    return function


def _evaluate(way: str, **names: Any) -> Tensor:
    made: Tensor = eval(way.format(x="x"), {"torch": torch}, names)
    return made


def spell(recipe: Recipe, spelling: Spelling, wide: torch.dtype = torch.float32) -> Spelled:
    """``recipe`` written as ``spelling`` says; ``wide`` is the dtype of upcasts, float64 for an exact run."""
    body = "\n".join(_Writer(recipe, spelling, wide).lines())
    names = ", ".join(("q", "k", "v", *(arg.name for arg in recipe.args)))
    indented = "\n".join(f"    {line}" for line in body.split("\n") if line)
    return Spelled(recipe, spelling, f"def attention({names}):\n{indented}\n")


@dataclass(frozen=True)
class _Writer:
    recipe: Recipe
    spelling: Spelling
    wide: torch.dtype

    def lines(self) -> Iterator[str]:
        """The body: how the operands arrive, the sizes that the rest uses, and the rest."""
        rest = [line for block in self._rest() for line in block.split("\n") if line]
        arrive = [line for line in self._arrive() if line]
        yield from self._sizes([*arrive, *rest], arrive)
        yield from rest

    def _rest(self) -> Iterator[str]:
        yield from self._heads()
        yield from self._scale(before=True)
        if self.spelling.call != "none":
            yield f"out = {self._call()}"
            yield f"return {words.LEAVE[self.spelling.leave]}"
            return
        yield f"scores = {self._product()}"
        yield from self._scale(before=False)
        if self.recipe.softcap is not None:
            yield _with_constant(words.SOFTCAP[self.spelling.softcap], self.recipe.softcap)
        yield from self._biases()
        yield from self._masks()
        yield from self._weights()
        yield from self._out()

    def _call(self) -> str:
        keeps = [self._term(part, word) for part, word in self._said if part in self.recipe.masks]
        biases = [self._term(part, word) for part, word in self._said if part in self.recipe.biases]
        names = {"keep": " & ".join(f"({keep})" for keep in keeps), "bias": " + ".join(f"({bias})" for bias in biases)}
        options = [words.CALLED_MASK[self.spelling.apply].format(**names)]
        options += [f"scale={self.recipe.scale if self.spelling.scale == 'alpha' else 1.0!r}"]
        options += ["enable_gqa=True"] if self.spelling.heads == "enable_gqa" else []
        return f"F.scaled_dot_product_attention({', '.join(['q, k, v', *filter(None, options)])})"

    @property
    def _said(self) -> Iterator[tuple[Part, str]]:
        """Each bias and mask, and the word that it is said with."""
        return zip(self.recipe, self.spelling.terms, strict=True)

    # --- operands ---

    @property
    def _axes(self) -> tuple[str, str, str]:
        """Axes of query, key and value when they meet."""
        q, k, v = words.ARRIVE[self.spelling.arrive].axes
        return (
            (q, k, v)
            if self.spelling.heads in ("grouped", "enable_gqa")
            else (q, k.replace("k", "h"), v.replace("k", "h"))
        )

    def _arrive(self) -> Iterator[str]:
        inside, s = words.ARRIVE[self.spelling.arrive].inside, self.recipe.sizes
        heads = {"q": (s.heads, s.depth), "k": (s.kv_heads, s.depth), "v": (s.kv_heads, s.value_depth)}
        for x, (count, depth) in heads.items():
            yield f"{x} = {inside.format(x=x, heads=count, depth=depth)}" if inside else ""

    def _sizes(self, body: list[str], arrive: list[str]) -> Iterator[str]:
        """Names of the sizes that are used, read off the operands where possible; arrivals in between."""
        used = set(re.findall(r"\b[ABDEHKMN]\b", "\n".join(body)))
        packed = self.spelling.arrive.startswith("packed")
        if packed and "B" in used:
            yield "B = q.size(0)"
        yield from arrive
        for name in sorted(used - ({"B"} if packed else set())):
            yield f"{name} = {self._size(name)}"

    def _size(self, name: str) -> str:
        for x, axes in zip("qkv", words.ARRIVE[self.spelling.arrive].axes, strict=True):
            if name.lower() in axes:
                return f"{x}.size({axes.index(name.lower())})"
        s = self.recipe.sizes
        return str({"B": s.batch[-1], "H": s.heads, "K": s.kv_heads}[name])

    def _heads(self) -> Iterator[str]:
        template = words.HEADS[self.spelling.heads]
        for x, axes in zip("kv", words.ARRIVE[self.spelling.arrive].axes[1:], strict=True):
            if template:
                at = axes.index("k")
                sizes = ", ".join((*("-1" for _ in axes[: at + 1]), "H // K", *("-1" for _ in axes[at + 1 :])))
                yield f"{x} = {template.format(x=x, i=at, sizes=sizes, depth='D' if x == 'k' else 'E')}"

    # --- scores ---

    def _product(self) -> str:
        q, k, _ = self._axes
        rename = str.maketrans("abhmnd", "zyxijc")
        scores = q.replace("m", "").replace("d", "")
        names = {"q": q, "k": k, "s": f"{scores}mn", "s_turned": f"{scores}nm"}
        return words.PRODUCT[self.spelling.product][0].format(
            **names,
            **{f"{name}_renamed": value.translate(rename) for name, value in names.items()},
            **self._bmm_operands(),
        )

    def _bmm_operands(self) -> dict[str, str]:
        q, k, _ = self._axes
        key_t = words.KEY_T[self.spelling.key_t]
        stored = k.endswith("dn")
        q3, k3 = (
            ("q", "k")
            if q == "xmd"
            else ("q.reshape(B * H, M, D)", f"k.reshape(B * H, {'D, N' if stored else 'N, D'})")
        )
        add, beta = "q.new_empty(B * H, M, N)", "0"
        if self.spelling.add == "beta":
            add, beta = (
                self._flat(self._term(self.recipe.biases[0], self.spelling.terms[0]), self.recipe.biases[0]),
                "1",
            )
        return {
            "kt": "k" if stored else key_t.format(x="k"),
            "q3": q3,
            "k3t": k3 if stored else key_t.format(x=k3),
            "add": add,
            "beta": beta,
            "alpha": repr(self.recipe.scale) if self.spelling.scale == "alpha" else "1",
        }

    def _scale(self, before: bool) -> Iterator[str]:
        template = words.SCALE[self.spelling.scale]
        if template and template.startswith("scores") != before:
            yield _with_constant(template, self.recipe.scale)

    def _biases(self) -> Iterator[str]:
        if self.spelling.add == "beta":
            return
        for part, word in zip(self.recipe.biases, self.spelling.terms, strict=False):
            yield words.ADD[self.spelling.add].format(x=self._laid_out(self._term(part, word), part))

    def _masks(self) -> Iterator[str]:
        template = words.APPLY[self.spelling.apply]
        masks, chosen = self.recipe.masks, self.spelling.terms[len(self.recipe.biases) :]
        keeps = [self._laid_out(self._term(part, word), part) for part, word in zip(masks, chosen, strict=True)]
        if self.spelling.joined == "together" and keeps:
            keeps = [" & ".join(f"({keep})" for keep in keeps)] if len(keeps) > 1 else keeps
        for keep in keeps:
            yield f"keep = {keep}"
            yield template.format(x="keep", fill=_literal(self.recipe.fill))

    def _term(self, part: Part, word: str) -> str:
        return words.TERMS[part.word][word].inside.format(v=part.value)

    def _laid_out(self, term: str, part: Part) -> str:
        """A term that broadcasts to ``[*batch, H, M, N]`` in the layout of the scores."""
        axes = {axis for arg in part.args for axis in arg.axes}
        match self.spelling.layout:
            case "flat":
                return self._flat(term, part)
            case "grouped" if "h" in axes:
                return f"({term}).unflatten(-3, (K, H // K))"
            case "grouped" if "b" in axes:
                return f"({term}).unsqueeze(2)"
            case "turned":
                return f"({term}).mT"
        return term

    def _flat(self, term: str, part: Part) -> str:
        broadcasts = not any(arg.axes for arg in part.args) and "view" not in term
        return term if broadcasts else f"({term}).expand(B, H, M, N).reshape(B * H, M, N)"

    # --- weights ---

    def _weights(self) -> Iterator[str]:
        join, cut = words.SINK[self.spelling.sink]
        column = "sinks.view(1, H, 1, 1).expand(B, H, M, 1)"
        if self.spelling.arrive == "abhmd":
            column = "sinks.view(1, 1, H, 1, 1).expand(A, B, H, M, 1)"
        match self.spelling.layout:
            case "flat":
                column += ".reshape(B * H, M, 1)"
            case "grouped":
                column += ".unflatten(1, (K, H // K))"
        yield join.format(x=column)
        dim = -2 if self.spelling.layout == "turned" else -1
        ways = words.OTHER_WEIGHTS.get(self.recipe.weights, words.SOFTMAX)
        yield ways[self.spelling.softmax].format(dim=dim, wide=self.wide)
        yield cut
        yield words.DROPOUT[self.spelling.dropout]

    def _out(self) -> Iterator[str]:
        way = words.WEIGHTED[self.spelling.weighted]
        q, _, v = self._axes
        batch = q.replace("m", "").replace("d", "")
        names = {"s": f"{batch}mn", "s_turned": f"{batch}nm", "v": v, "o": f"{batch}me"}
        yield f"out = {way.contract.format(**names, v3='v' if v == 'xne' else 'v.reshape(B * H, N, E)')}"
        late = self.spelling.softmax == "late division"
        if late and way.layout != "four":
            yield "out = out / total.mT" if way.layout == "turned" else "out = out / total"
        if way.restore != "out":
            yield f"out = {way.restore}"
        if late and way.layout == "four":
            yield "out = out / total"
        yield f"return {words.LEAVE[self.spelling.leave]}"


def _with_constant(template: str, constant: float | str | None) -> str:
    match constant:
        case str():
            return template.format(c=constant)
        case None:
            return template
        case value:
            return template.format(c=repr(value), r=repr(1 / value), root=repr(math.sqrt(abs(value))))


def _literal(fill: float) -> str:
    if math.isinf(fill):
        return 'float("-inf")'
    named = {torch.finfo(dtype).min: f"torch.finfo(torch.{name}).min" for name, dtype in _DTYPES.items()}
    return named.get(fill, repr(fill))


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
