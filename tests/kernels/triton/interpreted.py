"""The bodies at small sizes, every feature, forward and backward, held to the numerics contract.

``test_interpreter`` runs this file in a process of its own, where Triton interprets. Its interpreter computes
bfloat16 wrongly, without saying so, so operands are float32 and float16.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from attnfuse.kernels.gluon.finish import finish
from attnfuse.kernels.kernel import Residual
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.gradients import Gradients
from attnfuse.kernels.triton.launch import attend
from attnfuse.kernels.triton.tables import BackwardSchedules
from attnfuse.reference import attention as reference
from attnfuse.score import P
from tests.kernels.cases import COMMON, MIN, SPECS, Case, Sizes, assert_as_exact, case, exact, spec, written_out

TILE = Schedule(rows=16, keys=16)
#: dK and dV from one launch, and from one each.
TOGETHER, APART = BackwardSchedules(TILE, TILE), BackwardSchedules(TILE, TILE, TILE)
KEYS_OUTSIDE = replace(TILE, algorithm="keys outside")
SMALL = Sizes((2,), 2, 1, 19, 37, 8, 8)
#: Paths through the forward that other specs take too.
_ALIKE = (
    "plain", "negative scale", "causal, bottom right", "causal, mild fill", "fill of one", "window, finite fill",
    "padding", "bias of everything", "softcap", "sink, finite fill",
)  # fmt: skip
FORWARD = {name: spec for name, spec in COMMON.items() if spec.weight == P and name not in _ALIKE}
#: Each of these has a path of its own through the backward.
BACKWARD = (
    "causal", "causal, rows without keys", "causal, rows of equal weights", "window", "padding", "two biases", "alibi",
    "softcap, causal", "sink", "sink, finite fill", "dropout",
)  # fmt: skip


def check(given: Case, schedule: Schedule = TILE) -> None:
    out, lse = attend(given.spec, given.operands, with_lse=True, schedule=schedule)
    true, true_lse = reference(given.spec, given.operands)
    source = true if given.spec.dropout else written_out(given)
    # sums are taken tile by tile, each rounding once more
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, equal_nan=True)


@pytest.mark.parametrize("schedule", [TILE, KEYS_OUTSIDE], ids=lambda schedule: schedule.algorithm)
@pytest.mark.parametrize("name", FORWARD)
def test_every_spec(name: str, schedule: Schedule) -> None:
    check(case(FORWARD[name], SMALL, torch.float32), schedule)


SCHEDULES = {
    "longest first": replace(TILE, order="longest first"),
    "persistent": replace(TILE, order="persistent"),
    "descriptors": replace(TILE, loading="descriptor"),
    "query-key ahead": replace(TILE, pipelining="query-key ahead"),
    "weight-value behind": replace(TILE, pipelining="weight-value behind"),
    "split keys": replace(TILE, algorithm="split keys", splits=5),
    "wide tiles": Schedule(rows=16, keys=64),
}
#: Five tiles of rows make spans of two, two and one, or of one each and none.
SPANS = {
    "one span": KEYS_OUTSIDE,
    "spans": replace(KEYS_OUTSIDE, spans=3),
    "empty spans": replace(KEYS_OUTSIDE, spans=7),
    "longest first": replace(KEYS_OUTSIDE, spans=3, order="longest first"),
    "persistent": replace(KEYS_OUTSIDE, spans=3, order="persistent"),
    "descriptors": replace(KEYS_OUTSIDE, spans=3, loading="descriptor"),
    "wide tiles": Schedule("keys outside", rows=16, keys=64, spans=3),
    "high tiles": Schedule("keys outside", rows=64, keys=16, spans=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str) -> None:
    for name in ("causal", "window", "sink, finite fill" if "keys" not in schedule else "sink", "dropout"):
        check(case(SPECS[name], replace(SMALL, batch=(1,)), torch.float32), SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SPANS)
def test_every_schedule_with_keys_outside(schedule: str) -> None:
    """A tile of keys meets the tiles of rows that see it, and no other, whether or not tiles divide rows and keys."""
    sizes = (Sizes((1,), 1, 1, 70, 53, 8, 8), Sizes((1,), 1, 1, 80, 96, 8, 8))
    for of, name in product(sizes, ("causal", "window", "sink, finite fill")):
        check(case(SPECS[name], of, torch.float32), SPANS[schedule])


SIZES = {
    "half types": (Sizes((1,), 2, 2, 20, 40, 32, 32), torch.float16),
    "a head size that is no power of two": (Sizes((1,), 1, 1, 9, 33, 40, 24), torch.float32),
    "decoding packs heads": (Sizes((2,), 8, 2, 1, 35, 16, 16), torch.float32),
    "few rows pack heads": (Sizes((1,), 6, 2, 3, 35, 16, 16), torch.float32),
    "no batch": (Sizes((), 2, 2, 17, 17, 16, 16), torch.float32),
    "two batches": (Sizes((2, 3), 1, 1, 9, 17, 16, 16), torch.float32),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(sizes: str) -> None:
    for name, schedule in product(("causal", "alibi"), (TILE, KEYS_OUTSIDE)):
        check(case(SPECS[name], *SIZES[sizes]), schedule)


def test_strides_are_taken_as_they_are() -> None:
    given = case(SPECS["causal"], replace(SMALL, width=16, value_width=16, keys=40), torch.float32)
    for loading, schedule in product(("pointer", "descriptor"), (TILE, KEYS_OUTSIDE)):
        check(given.transposed(), replace(schedule, loading=loading))


def test_a_broadcast_batch_of_keys() -> None:
    given = case(SPECS["causal"], SMALL, torch.float32)
    shared = replace(given, key=given.key[:1], value=given.value[:1])
    for loading, schedule in product(("pointer", "descriptor"), (TILE, KEYS_OUTSIDE)):
        check(shared, replace(schedule, loading=loading))


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients(name: str) -> None:
    given = case(SPECS[name], SMALL, torch.float32)
    check_gradients(given, with_lse=name in ("causal", "sink, finite fill"))


@pytest.mark.parametrize("name", ["causal, rows of equal weights", "window", "two biases", "dropout"])
def test_gradients_of_key_and_value_from_launches_of_their_own(name: str) -> None:
    check_gradients(case(SPECS[name], SMALL, torch.float32), schedules=APART)


@pytest.mark.parametrize("fill", [MIN, float("-inf")], ids=["lowest", "infinite"])
@pytest.mark.parametrize("axes", ["b0,h,m,n", "b0,m", "b0,n", "b0"])
def test_an_additive_mask_that_leaves_rows_nothing(axes: str, fill: float) -> None:
    """Behind the lowest number rows weigh all keys equally; behind -inf they are NaN."""
    given = case(spec("0.3 * s + t0", f"float32[{axes}]"), SMALL, torch.float32)
    (mask,) = given.captures
    mask[(..., slice(1, None, 4), slice(None)) if "m" in axes else 1] = fill
    if fill == MIN and "n" in axes:
        mask[..., ::2] = fill
    check(given)
    check(given, KEYS_OUTSIDE)
    # what is added to all keys alike has a gradient of zero, and one that is computed is rounding alone
    check_gradients(given, compared=3 + ("n" in axes))


@pytest.mark.parametrize("batch", [1, 3, 5], ids=["one head", "heads summed afterwards", "heads summed in a program"])
def test_the_gradient_of_a_full_bias_behind_a_mask(batch: int) -> None:
    """Tiles that the mask skips are zero in it."""
    masked = spec("where(n <= m, 0.3 * s + t0, -inf)", "float32[h,m,n]")
    check_gradients(case(masked, replace(SMALL, batch=(batch,), heads=1, rows=33), torch.float32))


#: Captures whose gradient is a sum over a row's keys: each is off where ``delta`` is, unless that is put right.
SUMMED = {
    "slopes": (SPECS["alibi"], False),
    "scales": (SPECS["scale of each head"], True),
    "slopes beside a sink": (
        spec("where(n <= m - 3, 0.3 * s + t0 * (n - m), -inf)", "float32[h]", "float32[h]", sink="t1"),
        True,
    ),
    "slopes where weights are dropped": (spec("0.3 * s + t0 * (n - m)", "float32[h]", dropout=0.3), False),
    "slopes beside a bias, in a launch of their own": (
        spec("0.3 * s + t0 + t1 * (n - m)", "float32[h,m,n]", "float32[h]"),
        True,
    ),
    "slopes in rows of equal weights": (spec(f"where(n <= m - 3, 0.3 * s + t0 * (n - m), {MIN})", "float32[h]"), False),
}


@pytest.mark.parametrize("name", SUMMED)
def test_an_out_that_was_rounded_shows_in_no_sum_over_keys(name: str) -> None:
    """As with bfloat16, whose results are held to a float32 source here: nothing but ``out`` is rounded."""
    of, with_lse = SUMMED[name]
    check_gradients(case(of, SMALL, torch.float32), with_lse=with_lse, out_type=torch.bfloat16)


def check_gradients(
    given: Case, *, with_lse: bool = False, out_type: torch.dtype = torch.float32, compared: int | None = None,
    schedules: BackwardSchedules = TOGETHER,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(*given.query.shape[:-1], given.value.shape[-1], generator=generator)
    grad_lse = torch.randn(*given.query.shape[:-1], generator=generator) if with_lse else None
    out, lse = attend(given.spec, given.operands, with_lse=True, schedule=TILE)
    needs = [x.is_floating_point() for x in given.tensors]
    residual = Residual(out.to(out_type).to(out.dtype), lse, grad_lse)
    found = Gradients(given.spec, grad_out, given.operands, needs, residual, schedules).run()
    source, truth = (differentiated(x, grad_out, grad_lse) for x in (given, given.to(torch.float64)))
    # weights are exp(s - lse), whose relative error is that of the lse
    roundings = 16.0 + lse.nan_to_num(neginf=0.0).clamp(-1e3, 1e3).abs().amax().item()
    ours = [x for x in found if x is not None]
    judged = slice(compared)
    if out_type != out.dtype:
        # the others' gradients are no more exact than out is
        place = next(place for place, x in enumerate(given.tensors) if x.shape[-2:] == (1, 1))
        judged = slice(place, place + 1)
    assert_as_exact(ours[judged], source[judged], truth[judged], roundings)


def differentiated(given: Case, grad_out: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
    leaves = given.leaves()
    out, lse = reference(leaves.spec, leaves.operands)
    total = (out * grad_out.to(out.dtype)).sum()
    total = total if grad_lse is None else total + (lse * grad_lse).sum()
    floats = [x for x in leaves.tensors if x.requires_grad]
    found = torch.autograd.grad(total, floats, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(floats, found, strict=True)]


@pytest.mark.parametrize(("tile", "block"), [(64, 128), (64, 64), (128, 64)])
def test_dq_is_read_in_the_order_that_hopper_adds_it_in(tile: int, block: int) -> None:
    """The order of ``as_threads_have_it`` of the Gluon backward, in torch's words; Gluon has no interpreter."""
    batch, heads, rows, width = 2, 3, tile + 22, block - 8
    down, tiles = tile // 16, -(-rows // tile)
    across = 8 // down
    whole = torch.randn(batch, heads, tiles * tile, block)
    parts = whole.view(-1, down, 2, 8, across, block // across // 16, 2, 4, 2)
    added = parts.permute(0, 5, 2, 1, 4, 3, 7, 6, 8).contiguous()
    found = torch.full((batch, rows, heads, width), float("nan")).transpose(1, 2)
    strides = found.stride()[:3]
    finish[(batch * heads * tiles,)](added, found, heads, rows, *strides, 0.5, tile, block, width, 8)
    torch.testing.assert_close(found, 0.5 * whole[:, :, :rows, :width], atol=0, rtol=0)


def test_float32_is_as_exact_however_far_from_zero_scores_are() -> None:
    """Where each is 1024 more, their differences are the same, and exact; times log2(e) 1024 is off by 2^-14."""
    given = case(spec("1.0 * s"), SMALL, torch.float32)
    for far in (0.0, 32.0):
        query, key = (x.mul(4).round() / 4 for x in (given.query, given.key))
        query[..., 0] = key[..., 0] = far
        moved = replace(given, query=query, key=key)
        assert_as_exact([attend(moved.spec, moved.operands, schedule=TILE)[0]], [exact(moved)], [exact(moved)], 8.0)
