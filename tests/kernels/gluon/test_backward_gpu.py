"""On a Hopper GPU: gradients of every spec and size that is not declined, as exact as the written-out program's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnfuse.kernels import lookup
from attnfuse.kernels.gluon.hopper import declined
from attnfuse.kernels.triton.gradients import Gradients, Sums
from attnfuse.target import Target
from tests.kernels.cases import MIN, SIZES, SPECS, Case, Sizes, assert_as_exact, cancelling, case, spec, written_out
from tests.kernels.gluon.test_gpu import WIDE, pytestmark  # noqa: F401 - a mark of this module's tests
from tests.kernels.gluon.test_random import drawn
from tests.kernels.test_backward import gradients

#: Each is a kernel of its own to compile.
TRIED = [(sizes, torch.bfloat16) for sizes in ("grouped heads", "64", "128", "96 and 80")] + [("128", torch.float16)]


@pytest.fixture(autouse=True)
def _own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the gradients would be another kernel's."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backward is another kernel's")

    monkeypatch.setattr(type(lookup("triton")), "backward", refuse)


def on_gpu(given: Case) -> Case:
    moved = [x.to("cuda") for x in given.tensors]
    return Case(given.spec, *moved[:3], tuple(moved[3:]))


def checked(given: Case) -> None:
    given = on_gpu(given)
    out = (*given.query.shape[:-1], given.value.shape[-1])
    grad_out = torch.randn(out, generator=torch.Generator().manual_seed(1)).to("cuda", given.value.dtype)
    leaves = given.leaves()
    floats = [x for x in leaves.tensors if x.requires_grad]
    source = torch.autograd.grad(written_out(leaves), floats, grad_out, allow_unused=True)
    source = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(floats, source, strict=True)]
    truth = gradients(given.to(torch.float64), None, grad_out)
    assert_as_exact(gradients(given, "gluon", grad_out), source, truth, 8.0, cancelling(given, grad_out))


@pytest.mark.parametrize(("sizes", "dtype"), TRIED)
@pytest.mark.parametrize("name", SPECS)
def test_as_exact_as_the_written_out_program(name: str, sizes: str, dtype: torch.dtype) -> None:
    given = case(SPECS[name], {**SIZES, **WIDE}[sizes], dtype)
    shapes = (given.query.shape, given.key.shape, given.value.shape)
    if lookup("gluon").reasons_against(given.problem(), Target.parse("cuda:sm90")) or declined(*shapes):
        pytest.skip("refused")
    checked(given)


@pytest.mark.parametrize("mask", ["0.1 * s", "causal", "window"])
@pytest.mark.parametrize("width", [64, 128])
def test_every_number_of_tiles(width: int, mask: str) -> None:
    """From one to several, whole and cut, of rows and of keys."""
    score = SPECS["plain" if mask == "0.1 * s" else mask]
    for rows in (1, 64, 65, 130, 300):
        for keys in (1, 128, 129, 300, 520):
            # a causal row keeps its first key, a row past the window's last key keeps none
            sizes = Sizes(batch=(1,), heads=2, kv_heads=1, rows=rows, keys=keys, width=width, value_width=width)
            if mask != "window" or rows <= keys:
                checked(case(score, sizes, torch.bfloat16))


def test_any_strides() -> None:
    given = on_gpu(case(SPECS["causal"], WIDE["128"], torch.bfloat16))
    grad_out = torch.randn(*given.query.shape[:-1], 1, device="cuda", dtype=torch.bfloat16).expand(given.query.shape)
    found, wanted = gradients(given.transposed(), "gluon", grad_out), gradients(given, "gluon", grad_out.contiguous())
    # two sums of the same numbers in another order
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))


def test_keys_and_values_are_exact_again() -> None:
    """Only the query's gradient is added up in no order."""
    given = on_gpu(case(SPECS["causal"], WIDE["128"], torch.bfloat16))
    grad_out: Tensor = torch.randn_like(given.query)
    runs = [gradients(given, "gluon", grad_out) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:], strict=True))


#: Masks that are no band; every row keeps a key, or not.
LISTED = {
    "documents": (spec("where((n <= m) & (t0 == t1), 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"), True),
    "documents both ways": (spec("where(t0 == t1, 0.1 * s, -inf)", "int64[b0,m]", "int64[b0,n]"), True),
    "documents and slopes": (
        spec("where((n <= m) & (t0 == t1), 0.1 * s + t2 * (n - m), -inf)", "int32[m]", "int32[n]", "float32[h]"), True,
    ),
    "documents in a window": (
        spec("where((n <= m) & (n >= m - 300) & (t0 == t1), 0.1 * s, -inf)", "int32[m]", "int32[n]"), True,
    ),
    "blocks of each head": (spec("where(t0 | (m == n), 0.1 * s, -inf)", "bool[h,m,n]"), True),
    "prefix": (spec("where((n <= m) | (n < 200), 0.1 * s, -inf)"), True),
    "softcap and a prefix": (spec("where((n <= m) | (n < 200), 5.0 * tanh(0.1 * s / 5.0), -inf)"), True),
    "padding, finite fill": (spec(f"where((n <= m) & (t0 | (n < 1)), 0.1 * s, {MIN})", "bool[b0,n]"), True),
    "documents, a bias": (
        spec("where((n <= m) & (t0 == t1), 0.1 * s + t2, -inf)", "int32[m]", "int32[n]", "bfloat16[h,m,n]"), True,
    ),
    "documents, a sink": (
        spec("where((n <= m) & (t0 == t1), 0.1 * s, -inf)", "int32[m]", "int32[n]", "float32[h]", sink="t2"), True,
    ),
    "rows without keys": (spec("where(t0 == t1, 0.1 * s, -inf)", "int64[b0,m]", "int64[b0,n]"), False),
    "rows without keys, causal, finite fill": (spec(f"where((n <= m) & t0, 0.1 * s, {MIN})", "bool[b0,n]"), False),
    "rows without keys, finite fill": (spec(f"where(t0, 0.1 * s, {MIN})", "bool[b0,m,n]"), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_tiles(name: str) -> None:
    of, kept = LISTED[name]
    given = drawn(of, Sizes((2,), 4, 2, 1160, 1160, 128, 128), torch.bfloat16, 1)
    if kept:
        ids = [x for x in given.captures if not x.is_floating_point() and x.dtype != torch.bool]
        for rows, keys in zip(ids[::2], ids[1::2], strict=True):
            keys.copy_(rows.mT)
    checked(given)


#: Biases whose gradient the body writes, or adds to: for each whether tiles may be left out.
BIASES = {
    "of heads": spec("0.1 * s + t0", "bfloat16[h,m,n]"),
    "of heads, causal": spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[h,m,n]"),
    "of everything": spec("where(n <= m, 0.1 * s + t0, -inf)", "bfloat16[b0,h,m,n]"),
    "of batches": spec("0.1 * s + t0", "bfloat16[b0,m,n]"),
    "and a sink of its own": spec("0.1 * s + t0", "bfloat16[h,m,n]", "float32[h]", sink="t1"),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("rows", [1, 700, 1160])
def test_a_bias_has_the_gradient_of_the_scores(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = BIASES[name]
    given = drawn(of, Sizes((2,), 4, 2, rows, 520, 128, 128), torch.bfloat16, 1)
    through = Gradients._through_scores

    def others(self: Gradients, slot: int, sums: Sums) -> Tensor | None:
        assert of.captures[slot].dtype != "bfloat16"
        return through(self, slot, sums)

    monkeypatch.setattr(Gradients, "_through_scores", others)
    checked(given)
