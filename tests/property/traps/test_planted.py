"""Wrong rewrite rules, planted one at a time: the certificate turns each into a refusal, and the result stays right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.passes.certify import inputs
from attnfuse.passes.lift import assemble, normaliser, operand, spine, view
from attnfuse.passes.simplify import canonical
from attnfuse.report import Report
from attnfuse.score import Apply, Capture, Const, Expr, rewrite
from tests.support.doors import as_module, rewritten
from tests.support.never_wrong import qkv

Patch = pytest.MonkeyPatch
INF = float("inf")
MIN = torch.finfo(torch.float32).min


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


# --- programs -------------------------------------------------------------------------------------------


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT * 0.3, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril()
    return attend((q @ k.mT).masked_fill(~keep, -INF), v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril().triu(-2)
    return attend((q @ k.mT).masked_fill(~keep, -INF), v)


def filled(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(drop, -INF), v)


def finitely_filled(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(drop, -1e4), v)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(q @ k.mT + bias, v)


def biased_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(torch.add(q @ k.mT, bias, alpha=2), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :2].repeat_interleave(2, dim=1), v[:, :2].repeat_interleave(2, dim=1)
    return attend(q @ k.mT, v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(2.0 * torch.tanh(q @ k.mT / 2.0), v)


def sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.view(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), 1)
    return torch.softmax(torch.cat([q @ k.mT, column], dim=-1), dim=-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(k.size(-2))[None, :] - torch.arange(q.size(-2))[:, None]
    return attend(q @ k.mT + slopes[:, None, None] * distance, v)


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return attend(scores - scores.amax(-2, keepdim=True), v)


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, dim=-1) * gate) @ v


def over_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-2) @ v


# --- wrong rules ----------------------------------------------------------------------------------------


def read_by(name: str, wrong: Callable[..., Expr]) -> Callable[[Patch], None]:
    """Reads an operation by ``wrong(right, reader, node, args, place)``, in every table that has it."""

    def plant(patch: Patch) -> None:
        for table in (spine._RULES, view.VIEWS, operand._FACTORED):
            right = table.get(name)
            if right is not None:
                patch.setitem(table, name, lambda *given, right=right: wrong(right, *given))

    return plant


def with_argument(**changed: Any) -> Callable[..., Expr]:
    """The operation, read as if it had been called with other arguments: values, or functions of the right ones."""

    def wrong(right: Callable[..., Expr], reader: Any, node: Any, args: dict[str, Any], place: Any) -> Expr:
        other = {name: new(args) if callable(new) else new for name, new in changed.items()}
        return right(reader, node, {**args, **other}, place)

    return wrong


def first_operand(right: Any, reader: Any, node: Any, args: Any, place: Any) -> Expr:
    return reader.read(args["self"], place)


def as_repeat(right: Any, reader: Any, node: Any, args: Any, place: Any) -> Expr:
    counts = [args["repeats"] if at == args["dim"] else 1 for at in range(len(place))]
    return view.VIEWS["repeat"](reader, node, {"self": args["self"], "repeats": counts}, place)


def scores_changed(change: Callable[[Expr], Expr]) -> Callable[[Patch], None]:
    """The score program of every site goes through ``change`` before it is simplified."""

    def plant(patch: Patch) -> None:
        patch.setattr(spine, "read_site", lambda *given: _changed(assemble.read_site(*given), change))

    return plant


def _changed(site: Any, change: Callable[[Expr], Expr]) -> Any:
    return None if site is None else replace(site, score=rewrite(site.score, change))


def flipped_mask(part: Expr) -> Expr:
    match part:
        case Apply("where", (keep, x, fill)):
            return Apply("where", (Apply("not", (keep,)), x, fill))
    return part


def fill_becomes(value: float) -> Callable[[Expr], Expr]:
    return lambda part: Const(value) if isinstance(part, Const) and part.value in (-INF, -1e4) else part


def turned_bias(patch: Patch) -> None:
    right = canonical._capture_layout

    def wrong(leaf: Any, groups: Any) -> Any:
        return right(leaf, (*groups[:-2], groups[-1], groups[-2]))

    patch.setattr(canonical, "_capture_layout", wrong)


def turned_value(patch: Patch) -> None:
    right = canonical._operands

    def wrong(site: Any, roles: Any) -> Any:
        query, key, value = right(site, roles)
        return query, key, replace(value, groups=(*value.groups[:-2], value.groups[-1], value.groups[-2]))

    patch.setattr(canonical, "_operands", wrong)


def no_sink(patch: Patch) -> None:
    patch.setattr(normaliser, "_beyond", lambda key, size: [])


def any_maximum(patch: Patch) -> None:
    patch.setattr(normaliser, "_is_row", lambda atom, reader, kind, dim, row: getattr(atom, "kind", "") == kind)


def no_weight(patch: Patch) -> None:
    right = assemble.weight_program
    patch.setattr(assemble, "weight_program", lambda *given: (right(*given)[0], assemble.P))


def capture_dropped(part: Expr) -> Expr:
    match part:
        case Apply("add", (x, Capture())):
            return x
    return part


def no_empty_rows(patch: Patch) -> None:
    """What keeps no key is zero, as a library's safe softmax has it."""
    patch.setattr(spine, "read_site", lambda *given: _with_zeros(assemble.read_site(*given)))


def _with_zeros(site: Any) -> Any:
    return None if site is None else replace(site, empty_rows="zero")


def filled_is_masked(part: Expr) -> Expr:
    """A bias so low that it swallows any score is a mask: wrong in rows that have nothing but such."""
    match part:
        case Apply("add", (_, Capture() as bias)):
            return Apply("where", (Apply("gt", (bias, Const(-1e30))), part, Const(-INF)))
    return part


@dataclass(frozen=True)
class Planted:
    """A wrong rule, and a program that it makes wrong. All sizes are such that every shape still fits."""

    plant: Callable[[Patch], None]
    program: Callable[..., Tensor]
    captures: tuple[tuple[int, ...] | str | float, ...] = ()


N = 8  # rows, keys and features alike, so that nothing but the values tells a turned tensor from a right one
PLANTED = {
    "the scale is dropped": Planted(read_by("mul", first_operand), scaled),
    "causal is off by one": Planted(read_by("tril", with_argument(diagonal=1)), causal),
    "the window is one too wide": Planted(read_by("triu", with_argument(diagonal=-3)), window),
    "the mask is turned round": Planted(scores_changed(flipped_mask), filled, ("mask",)),
    "the fill is 0 instead of -inf": Planted(scores_changed(fill_becomes(0.0)), filled, ("mask",)),
    "the fill is -inf instead of -1e4": Planted(scores_changed(fill_becomes(-INF)), finitely_filled, ("mask",)),
    "the bias is transposed": Planted(turned_bias, biased, ((N, N),)),
    "the bias is forgotten": Planted(scores_changed(capture_dropped), biased, ((N, N),)),
    "alpha is forgotten": Planted(read_by("add", with_argument(alpha=1)), biased_twice, ((N, N),)),
    "heads are shared in the order of repeat": Planted(read_by("repeat_interleave", as_repeat), grouped),
    "the softcap is forgotten": Planted(read_by("tanh", first_operand), capped),
    "the sink is left out of the sum": Planted(no_sink, sunk, ((4,),)),
    "the distance has the wrong sign": Planted(
        read_by("sub", with_argument(self=lambda a: a["other"], other=lambda a: a["self"])), alibi, ((4,),)
    ),
    "a maximum over rows is dropped": Planted(any_maximum, shifted),
    "the gate on the weights is forgotten": Planted(no_weight, gated, ((4, 1, N),)),
    "the value is transposed": Planted(turned_value, scaled),
    "rows that a mask leaves nothing of are zero": Planted(no_empty_rows, biased, (-INF,)),
    "a mask's lowest number is -inf": Planted(scores_changed(filled_is_masked), biased, (MIN,)),
    "the softmax runs over keys whatever it says": Planted(read_by("softmax", with_argument(dim=-1)), over_rows),
}


def _inputs(case: Planted) -> tuple[Tensor, ...]:
    drop = torch.rand(N, N) < 0.5
    drop[2] = True
    captures = (_capture(each, drop) for each in case.captures)
    return (*qkv(rows=N, keys=N, depth=N), *captures)


def _capture(wanted: tuple[int, ...] | str | float, drop: Tensor) -> Tensor:
    """A mask, a mask that is added with a fill, or a random tensor of a shape."""
    if isinstance(wanted, str):
        return drop
    return torch.zeros(N, N).masked_fill(drop, wanted) if isinstance(wanted, float) else torch.randn(wanted)


def _fused(case: Planted, args: tuple[Tensor, ...], certify: str) -> tuple[Report, Tensor]:
    program = rewritten("training IR", as_module(case.program), args, certify=certify)
    return program.report, program.run(*args)


@pytest.mark.parametrize("name", PLANTED)
def test_the_certificate_refuses_a_planted_rule(name: str, monkeypatch: Patch) -> None:
    case = PLANTED[name]
    args = _inputs(case)
    expected = case.program(*args)
    case.plant(monkeypatch)
    unchecked, wrong = _fused(case, args, "off")
    assert unchecked.fused, unchecked
    assert not torch.allclose(wrong, expected, atol=1e-2, equal_nan=True), "the planted rule does no harm"
    report, got = _fused(case, args, "quick")
    assert not report.fused
    (refusal,) = report.refused
    assert "the rewrite is not equivalent" in refusal.reason
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["rows that a mask leaves nothing of are zero", "a mask's lowest number is -inf"])
def test_whole_rows_of_a_mask_show_what_nothing_else_does(name: str, monkeypatch: Patch) -> None:
    case = PLANTED[name]
    args = _inputs(case)
    case.plant(monkeypatch)
    monkeypatch.setattr(inputs, "_whole_rows", lambda shape: torch.zeros(1, dtype=torch.bool))
    report, _ = _fused(case, args, "quick")
    assert report.fused


@pytest.mark.parametrize("name", PLANTED)
def test_without_the_planted_rule_it_fuses_or_is_refused_for_what_it_is(name: str) -> None:
    case = PLANTED[name]
    args = _inputs(case)
    report, got = _fused(case, args, "quick")
    assert "not equivalent" not in str(report)
    torch.testing.assert_close(got, case.program(*args), equal_nan=True)
