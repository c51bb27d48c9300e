"""Each kernel, run through the op, is as exact as the written-out program, on every spec it does not refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.torch_version import TorchVersion

from attnfuse.kernels import lookup
from attnfuse.op import attention
from attnfuse.reference import attention as reference
from attnfuse.target import Target
from tests.kernels.cases import BATCHES, SIZES, SPECS, Case, assert_as_exact, case, conditioning, exact, written_out

CPU = Target("cpu")
KERNELS = ("blocked", "direct", "flex", "sdpa")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(given: Case, kernel: str, *, with_lse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    operands = (given.query, given.key, given.value, given.captures, [])
    found: tuple[torch.Tensor, torch.Tensor] = attention(*operands, given.spec.to_text(), kernel, with_lse)
    return found


def able(given: Case, kernel: str) -> bool:
    return not lookup(kernel).reasons_against(given.problem(), CPU)


@lru_cache
def products_leak() -> bool:
    """Whether torch's bfloat16 product lets a row of NaN into the row before it.

    oneDNN's does with AMX where as many columns as are summed over are odd (torch 2.11): it reads them in pairs.
    """
    rows = torch.ones(2, 301, 307, dtype=torch.bfloat16)
    rows[:, 270:] = float("nan")
    return bool(torch.bmm(rows, torch.ones(2, 307, 16, dtype=torch.bfloat16))[:, :270].isnan().any())


def check(given: Case, kernel: str) -> None:
    if not able(given, kernel):
        return
    out, _ = run(given, kernel)
    assert out.dtype == given.value.dtype
    assert out.transpose(-3, -2).is_contiguous()
    # a mask of dropout is not what rounds: its source is the reference in the operands' type
    source = reference(given.spec, given.operands)[0] if given.spec.dropout else written_out(given)
    if out.dtype == torch.bfloat16 and given.key.shape[-2] % 2 and products_leak():
        return
    # the reference in float64 is the truth itself, so its error is no measure there
    roundings = conditioning(given) if out.dtype == torch.float64 else 4.0
    assert_as_exact([out], [source], [exact(given)], roundings)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", SPECS)
def test_as_exact_as_the_written_out_program(name: str, sizes: str, kernel: str) -> None:
    for dtype in DTYPES if sizes in ("grouped heads", "several blocks") else (torch.float32,):
        check(case(SPECS[name], SIZES[sizes], dtype), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["causal", "sigmoid", "sink"])
@pytest.mark.parametrize("shape", [{"rows": 0}, {"keys": 0}])
def test_no_rows_and_no_keys(shape: dict[str, int], name: str, kernel: str) -> None:
    check(case(SPECS[name], replace(SIZES["grouped heads"], **shape), torch.float32), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["plain", "causal", "sink"])
def test_any_strides(name: str, kernel: str) -> None:
    given = case(SPECS[name], SIZES["grouped heads"], torch.float32)
    check(given.transposed(), kernel)
    if able(given, kernel):
        for found, wanted in zip(
            run(given.transposed(), kernel, with_lse=True), run(given, kernel, with_lse=True), strict=True
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", BATCHES)
def test_any_number_of_batch_dimensions(sizes: str, kernel: str) -> None:
    for name in ("scaled", "causal", "softcap, causal", "sink"):
        check(case(SPECS[name], BATCHES[sizes], torch.float32), kernel)


@pytest.mark.parametrize("kernel", ["blocked", "direct"])
def test_exact_scores_are_not_rounded_to_bfloat16(kernel: str) -> None:
    given = case(SPECS["exact scores"], SIZES["several blocks"], torch.bfloat16)
    given = replace(given, query=given.query * 6)
    rounded = replace(given, spec=replace(given.spec, exact_scores=False))
    errors = [(run(each, kernel)[0].double() - exact(given)).abs().amax() for each in (given, rounded)]
    assert errors[0] < torch.finfo(torch.bfloat16).eps * given.value.abs().amax() < errors[1]


def test_each_kernel_is_tried_on_something() -> None:
    tried = {k: sum(able(case(s, SIZES["odd"], torch.float32), k) for s in SPECS.values()) for k in KERNELS}
    flex = 24 if TorchVersion(torch.__version__) >= "2.13" else 0
    assert tried == {"blocked": len(SPECS), "direct": len(SPECS), "flex": flex, "sdpa": 12}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("empty", ["batch", "rows", "keys", "width", "value_width"])
def test_sizes_of_zero(empty: str, kernel: str) -> None:
    sizes = replace(SIZES["odd"], **{empty: (0,) if empty == "batch" else 0})
    for name in ("scaled", "causal", "sink"):
        given = case(SPECS[name], sizes, torch.float32)
        if able(given, kernel):
            out, lse = run(given, kernel, with_lse=True)
            true, true_lse = reference(given.spec, given.operands)
            torch.testing.assert_close((out, lse), (true, true_lse), equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broadcast_batch_of_keys(kernel: str) -> None:
    given = case(SPECS["causal"], SIZES["odd"], torch.float32)
    shared = replace(given, key=given.key[:1], value=given.value[:1])
    spread = replace(given, key=given.key[:1].expand_as(given.key), value=given.value[:1].expand_as(given.value))
    torch.testing.assert_close(run(shared, kernel)[0], run(spread, kernel)[0])


class TestFullyMaskedRows:
    """Three fills, three answers: NaN, the mean of all values, and nothing but the sink."""

    @pytest.fixture(params=["blocked", "direct"])
    def kernel(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_behind_minus_infinity_they_are_nan(self, kernel: str) -> None:
        given = case(SPECS["causal, rows without keys"], SIZES["odd"], torch.float32)
        assert run(given, kernel)[0].isnan().all(dim=-1)[..., :3].all()
        assert not run(given, kernel)[0][..., 3:, :].isnan().any()

    def test_behind_a_finite_fill_they_are_the_mean_of_every_value(self, kernel: str) -> None:
        given = case(SPECS["causal, rows of equal weights"], SIZES["odd"], torch.float32)
        mean = given.value.mean(dim=-2, keepdim=True).expand(-1, -1, 3, -1)
        torch.testing.assert_close(run(given, kernel)[0][..., :3, :], mean)

    def test_they_are_zero_where_the_spec_says_so(self, kernel: str) -> None:
        given = case(SPECS["empty rows zero"], SIZES["odd"], torch.float32)
        out = run(given, kernel)[0]
        assert not out[..., :3, :].any()
        assert out[..., 3:, :].all()

    def test_with_a_sink_they_are_zero(self, kernel: str) -> None:
        given = case(SPECS["sink"], SIZES["odd"], torch.float32)
        assert not run(given, kernel)[0][..., :3, :].any()

    def test_left_padding_makes_them_even_where_a_causal_mask_does_not(self, kernel: str) -> None:
        given = case(SPECS["padding and causal, finite fill"], SIZES["several blocks"], torch.float32)
        left = torch.arange(given.key.shape[-2]) >= 200
        given = replace(given, captures=(left.view(1, 1, 1, -1),))
        mean = given.value.mean(dim=-2, keepdim=True).expand(-1, 2, 200, -1)
        torch.testing.assert_close(run(given, kernel)[0][..., :200, :], mean)

    def test_a_bias_of_minus_infinity_makes_them_nan_in_sdpa_too(self) -> None:
        given = case(SPECS["bias"], SIZES["odd"], torch.float32)
        given.captures[0][:, :, 4] = float("-inf")
        out = run(given, "sdpa")[0]
        assert out[..., 4, :].isnan().all()
        assert out.isnan().sum() == out[..., 4, :].numel()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_masked_key_of_nan_contributes_nothing(kernel: str) -> None:
    given = case(SPECS["causal"], SIZES["odd"], torch.float32)
    clean = run(given, kernel)[0]
    given.key[..., 9:, :] = float("nan")
    torch.testing.assert_close(run(given, kernel)[0][..., :9, :], clean[..., :9, :])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keys", [3, 5, 16, 37])
@pytest.mark.parametrize("name", ["scaled", "causal", "bias", "empty rows zero"])
def test_rows_of_which_every_score_is_nan_are_nan(name: str, keys: int, kernel: str) -> None:
    """ATen's CPU kernel makes them zero where there are fewer keys than a vector register holds."""
    given = case(SPECS[name], replace(SIZES["odd"], rows=keys, keys=keys), torch.float32)
    given.query[..., 1, :] = float("nan")
    given.query[..., 2, :2] = torch.tensor([float("inf"), -float("inf")])
    given.key[..., 0, :] = float("nan")
    if able(given, kernel):
        true, true_lse = reference(given.spec, given.operands)
        out, lse = run(given, kernel, with_lse=True)
        assert torch.equal(out.isnan(), true.isnan())
        assert torch.equal(run(given, kernel)[0].isnan(), true.isnan())
        assert torch.equal(lse.isnan(), true_lse.isnan())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "name", ["scaled", "causal", "causal, rows without keys", "sink", "softcap, causal", "empty rows zero", "sigmoid"]
)
def test_lse(name: str, kernel: str) -> None:
    for sizes in SIZES.values():
        given = case(SPECS[name], sizes, torch.float32)
        if able(given, kernel):
            lse = run(given, kernel, with_lse=True)[1]
            assert lse.dtype == torch.float32
            assert lse.is_contiguous()
            torch.testing.assert_close(lse, reference(given.spec, given.operands)[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_trace_of_a_kernel_computes_what_the_kernel_does(kernel: str) -> None:
    for name in ("scaled", "causal", "window, finite fill", "sink", "softcap", "dropout"):
        given = case(SPECS[name], SIZES["several blocks"], torch.float32)
        if able(given, kernel):
            expanded = lookup(kernel).expand(given.spec, given.operands)
            torch.testing.assert_close(expanded, run(given, kernel)[0])


def test_results_do_not_depend_on_threads_or_on_inference_mode() -> None:
    given = case(SPECS["everything"], SIZES["several blocks"], torch.float32)
    once = run(given, "blocked")[0]
    with torch.inference_mode():
        again = run(given, "blocked")[0].clone()
    torch.testing.assert_close(again, once, rtol=0, atol=0)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(run(given, "blocked")[0], once)
    finally:
        torch.set_num_threads(1)
