"""The backward body in plain Python, launched as the kernel launches it: as exact as the written-out program."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from attnfuse.kernels import Residual, lookup
from attnfuse.kernels.gluon import backward_plan
from attnfuse.kernels.gluon.hopper import declined
from attnfuse.reference import attention as reference
from tests.kernels.cases import SPECS, Case, Sizes, assert_as_exact, cancelling, case, spec, written_out
from tests.kernels.gluon.plain_backward import Launched, in_plain_python  # noqa: F401 - a fixture
from tests.kernels.gluon.test_backward_gpu import BIASES, LISTED
from tests.kernels.gluon.test_random import drawn
from tests.kernels.test_backward import grad_out, gradients

#: Several tiles of rows and of keys, the last ones not full.
SIZES = Sizes((1,), 2, 1, 200, 300, 64, 64)
#: The partitions, in their order.
CONSUME, PRODUCE, ADD = range(3)


def check(given: Case, *places: int) -> None:
    """The gradients of query, key and value, and of the operands at ``places``, against float64."""
    asked, grad, leaves = (0, 1, 2, *places), grad_out(given), given.leaves()
    source = torch.autograd.grad(written_out(leaves), [leaves.tensors[place] for place in asked], grad)
    floats = [place for place, x in enumerate(leaves.tensors) if x.requires_grad]
    truth = dict(zip(floats, gradients(given.to(torch.float64), None, grad), strict=True))
    cancelled = dict(zip(floats, cancelling(given, grad), strict=True))
    assert not declined(given.query.shape, given.key.shape, given.value.shape)
    residual = Residual(*reference(given.spec, given.operands))
    needs = [place in asked for place in range(len(given.tensors))]
    found = lookup("gluon").backward(given.spec, grad, given.operands, needs, residual)
    wanted = [x for x in found if x is not None]
    assert_as_exact(wanted, source, [truth[x] for x in asked], 8.0, [cancelled[x] for x in asked])


FACTS = (
    *("early", "left", "right", "longest_first", "uncertain", "filled", "huge", "listed"),
    *("panel", "panel_batch", "panel_head", "panel_gradient", "panel_added"),
)
#: For each which facts its body is compiled for: nothing else.
MASKS = {
    "scaled": "early",
    "negative scale": "",
    "causal": "right longest_first",
    "causal, bottom right": "right longest_first",
    "window": "left right",
    "causal, rows without keys": "right longest_first uncertain",
    "causal, rows of equal weights": "right longest_first uncertain filled huge",
    "window, finite fill": "left right",
    "softcap": "",
    "softcap, causal": "right longest_first",
    "alibi": "right longest_first",
    "sink": "right longest_first",
    "sink, finite fill": "right longest_first uncertain filled huge",
    "padding": "uncertain",
    "documents": "uncertain",
    "scale of each head": "",
    "bias of everything": "uncertain huge",
}


def facts(launched: Launched) -> list[str]:
    """What the first body was compiled for."""
    return [each for each in FACTS if getattr(launched.sources[0].meta, each)]


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_programs(name: str, launched: Launched) -> None:
    check(case(SPECS[name], SIZES, torch.bfloat16))
    assert facts(launched) == MASKS[name].split()


@pytest.mark.parametrize("name", ["window", "window, finite fill"])
def test_rows_beyond_a_window_keep_no_key(name: str, launched: Launched) -> None:
    check(case(SPECS[name], Sizes((1,), 2, 1, 300, 200, 64, 64), torch.bfloat16))
    assert {"left", "right", "uncertain"} <= set(facts(launched))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("widths", [(128, 128), (64, 128), (96, 80)])
def test_widths_and_groups(widths: tuple[int, int]) -> None:
    for kv_heads in (1, 3):
        check(case(SPECS["causal"], Sizes((2,), 3, kv_heads, 130, 130, *widths), torch.float16))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("mask", ["scaled", "causal", "window"])
@pytest.mark.parametrize("keys", [1, 129, 300])
@pytest.mark.parametrize("rows", [1, 65, 130])
def test_every_number_of_tiles(rows: int, keys: int, mask: str) -> None:
    """One and several, whole and cut; of one key the gradients of query and key are zero."""
    check(case(SPECS[mask], Sizes((1,), 2, 1, rows, keys, 64, 64), torch.bfloat16))


def listed(name: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Documents of several lengths, the same of rows and keys where every row is to keep a key."""
    monkeypatch.setattr(backward_plan, "LISTED", 1)
    of, kept = LISTED[name]
    given = drawn(of, Sizes((1,), 2, 1, 400, 400, 64, 64), torch.bfloat16, 1, "cpu")
    ids = [x for x in given.captures if not x.is_floating_point() and x.dtype != torch.bool]
    for each in ids:
        each.copy_((torch.rand(each.shape) < 0.015).flatten(1).cumsum(1).view(each.shape))
    for rows, keys in zip(ids[::2], ids[1::2], strict=True):
        keys.copy_(rows.mT if kept else keys)
    return given


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_tiles(name: str, launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    check(listed(name, monkeypatch))
    assert "listed" in facts(launched)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("rows", [1, 200])
def test_a_bias_has_the_gradient_of_the_scores(name: str, rows: int, launched: Launched) -> None:
    given = drawn(BIASES[name], Sizes((2,), 2, 1, rows, 264, 64, 64), torch.bfloat16, 1, "cpu")
    check(given, 3)
    assert "panel_gradient" in facts(launched)
    assert ("panel_added" in facts(launched)) == (name != "of everything")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_bias_that_is_only_read(dtype: str, launched: Launched) -> None:
    of = spec("where(n <= m, 0.1 * s + t0, -inf)", f"{dtype}[b0,h,m,n]")
    check(drawn(of, Sizes((2,), 2, 1, 130, 264, 64, 64), torch.bfloat16, 1, "cpu"))
    assert {"panel", "panel_batch", "panel_head"} <= set(facts(launched))
    assert "panel_gradient" not in facts(launched)


# --- what partitions do to each other ---------------------------------------------------------------

#: Between them they have every barrier, and what is told of a tile.
CROWDED = ("causal", "documents, a bias")


def crowded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of :data:`CROWDED`, with the gradient of its bias; or of one key, whose terms cancel."""
    match name:
        case "one key":
            check(case(SPECS["scaled"], Sizes((1,), 2, 1, 130, 1, 64, 64), torch.bfloat16))
        case "causal":
            check(case(SPECS[name], Sizes((1,), 4, 1, 200, 200, 64, 64), torch.bfloat16))
        case _:
            check(listed(name, monkeypatch), 5)


@pytest.mark.parametrize("name", CROWDED)
@pytest.mark.parametrize("speed", list(permutations((CONSUME, PRODUCE, ADD))))
def test_whoever_is_the_fastest(
    speed: tuple[int, ...], name: str, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    launched.speed = speed
    crowded(name, monkeypatch)


class Broken(NamedTuple):
    """Changes of the body's text, who has to be the fastest for it to show, on what, and as what."""

    speed: tuple[int, ...]
    shows: str
    changes: tuple[tuple[str, str], ...]
    on: str = "causal"


ERROR, IN_FLIGHT = "error .*, source", "changed while its product was in flight"
STUCK, OVERRUN = "a phase never comes", "more arrivals than a phase has"
LAST_RELEASE = """        if step > 0:
            # this step's product of dK is in flight, all of the last's are done
            mbarrier.arrive(q.empty.index((step - 1) % meta.stages), count=1)
"""
TELL = "tell(coming, place, member, {}, batch, head, sizes, tensors, programs, meta)\n"
BROKEN = {
    "a tile released one step early": Broken((PRODUCE, ADD, CONSUME), IN_FLIGHT, (
        (LAST_RELEASE, "        mbarrier.arrive(q.empty.index(step % meta.stages), count=1)\n"),
    )),
    "a tile never released": Broken((PRODUCE, ADD, CONSUME), STUCK, ((LAST_RELEASE, ""),)),
    "scores of the wrong parity": Broken((CONSUME, PRODUCE, ADD), OVERRUN, (
        ("mbarrier.wait(q.full.index(place), parity)", "mbarrier.wait(q.full.index(place), parity ^ 1)"),
    )),
    "loaded one round early": Broken((PRODUCE, ADD, CONSUME), OVERRUN, (
        ("            mbarrier.wait(q.empty.index(place), parity ^ 1)",
         "            if step >= 2 * meta.stages: mbarrier.wait(q.empty.index(place), parity)"),
    )),
    "told after the tile": Broken((CONSUME, PRODUCE, ADD), ERROR, (
        ("            " + TELL.format("entry"), "            mine = entry\n"),
        ("            step += 1\n\n\n@gluon.jit\ndef tell",
         "            " + TELL.format("mine") + "            step += 1\n\n\n@gluon.jit\ndef tell"),
    )),
    "rows of the wrong stage": Broken((), ERROR, (
        ("coming.rows[slot].index(place).load(", "coming.rows[slot].index(0).load("),
    ), on="documents, a bias"),
    "delta of the wrong stage": Broken((), "NaN at other positions", (
        ("of_rows(sums.delta, step,", "of_rows(sums.delta, step + 1,"),
    )),
    "dQ stored before its room is free": Broken((CONSUME, PRODUCE, ADD), ERROR, (
        ("    mbarrier.wait(dq.empty.index(0), (step & 1) ^ 1)\n    dq.room.index(0).store(ordered)\n",
         "    dq.room.index(0).store(ordered)\n    mbarrier.wait(dq.empty.index(0), (step & 1) ^ 1)\n"),
    )),
    "dQ's room free before it has left": Broken((CONSUME, PRODUCE, ADD), ERROR, (
        ("        copies.wait(0)\n        mbarrier.arrive(dq.empty.index(0), count=1)\n",
         "        mbarrier.arrive(dq.empty.index(0), count=1)\n        copies.wait(0)\n"),
    )),
    "the bias's gradient overwritten": Broken((CONSUME, PRODUCE, ADD), ERROR, (
        ("            mbarrier.wait(dq.empty.index(0), (step & 1) ^ 1)\n        ds_room",
         "            pass\n        ds_room"),
    ), on="documents, a bias"),
    "a panel of the wrong parity": Broken((CONSUME, PRODUCE, ADD), STUCK, (
        ("mbarrier.wait(panel.full.index(0), step & 1)", "mbarrier.wait(panel.full.index(0), (step & 1) ^ 1)"),
    ), on="documents, a bias"),
    "dQ waited for too late": Broken((), "used before it is there", (
        ("warpgroup_mma_wait(2, deps=[dq_tile", "warpgroup_mma_wait(3, deps=[dq_tile"),
    )),
    "no fence before dQ's product": Broken((), "no fence has shown", (
        ("ds_room.store(dx)\n        fence_async_shared()", "ds_room.store(dx)"),
    )),
    "halves of weights confused": Broken((), ERROR, (
        ("(p_second, grads.slice(BM // 2, BM // 2, 0)", "(p_second, grads.slice(0, BM // 2, 0)"),
    )),
    "a thousandth of delta lost": Broken((), ERROR, (
        ("dx = p * (dp - gl.expand_dims(delta, 0))", "dx = p * (dp - gl.expand_dims(delta, 0) * 0.999)"),
    ), on="one key"),
    "dQ in another order": Broken((), ERROR, (("[4, 1, 0, 3, 2, 6, 5, 7]", "[4, 1, 0, 3, 2, 5, 6, 7]"),)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_shows(name: str, launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whereas the body as it is comes right at every speed."""
    broken = BROKEN[name]
    launched.changes, launched.speed = broken.changes, broken.speed
    with pytest.raises(AssertionError, match=broken.shows):
        crowded(broken.on, monkeypatch)
