"""Masks that a module keeps: read value by value where they can never change, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnfuse import rewrite
from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import rewritten
from tests.support.never_wrong import qkv

INF = float("inf")
CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
LEAST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Attention behind a part of a larger buffer, which says what to keep or is added; or a plain attribute."""

    mask: Tensor

    def __init__(self, mask: Tensor, persistent: bool | None = False, *, grows: bool = False) -> None:
        super().__init__()
        self.grows = grows
        if persistent is None:
            self.mask = mask
        else:
            self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = q.size(-2), k.size(-2)
        mask = self.mask[:, :, keys - rows : keys, :keys]
        scores = q @ k.mT * 0.3
        scores = torch.where(mask, scores, LEAST) if mask.dtype == torch.bool else scores + mask
        if self.grows:
            self.mask.logical_or_(torch.ones_like(self.mask))
        return torch.softmax(scores, -1) @ v


def checked(door: str, module: nn.Module, *args: Tensor) -> Report:
    program = rewritten(door, module, args)
    exact = module.double()(*(x.double() for x in args))
    assert_as_good(program.run(*args), module.float()(*args), exact)
    return program.report


@pytest.mark.parametrize("exported", ["training IR", "core ATen"])
@pytest.mark.parametrize("persistent", [False, None])
@pytest.mark.parametrize("added", [None, -INF, LEAST])
def test_what_cannot_change_is_a_predicate(exported: str, persistent: bool | None, added: float | None) -> None:
    mask = CAUSAL if added is None else torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, added)
    assert checked(exported, Masked(mask, persistent), *qkv()).fused[0].what == "scale 0.3, causal 3"


def test_one_wrong_value_is_no_predicate(door: str) -> None:
    mask = CAUSAL.clone()
    mask[0, 0, 5, 7] = True
    assert "causal" not in checked(door, Masked(mask), *qkv()).fused[0].what


def test_a_buffer_that_a_checkpoint_may_replace_stays_a_tensor() -> None:
    program, report = rewrite(torch.export.export(Masked(CAUSAL.clone(), persistent=True), qkv()), profit=False)
    assert "causal" not in report.fused[0].what
    loaded = program.module()
    loaded.load_state_dict({"mask": ~CAUSAL})
    q, k, v = qkv()
    torch.testing.assert_close(loaded(q, k, v), Masked(~CAUSAL)(q, k, v))


def test_an_attribute_under_torch_compile_stays_a_tensor() -> None:
    assert "causal" not in checked("dynamo", Masked(CAUSAL), *qkv()).fused[0].what


@pytest.mark.parametrize("exported", ["training IR", "core ATen"])
def test_a_buffer_that_is_written_stays_a_tensor(exported: str) -> None:
    program = torch.export.export(Masked(CAUSAL.clone(), grows=True), qkv())
    program = program if exported == "training IR" else program.run_decompositions()
    fused = rewrite(program, profit=False)[0].module()
    q, k, v = qkv()
    torch.testing.assert_close(fused(q, k, v), Masked(CAUSAL)(q, k, v))
    torch.testing.assert_close(fused(q, k, v), Masked(torch.ones_like(CAUSAL))(q, k, v))


def test_a_large_site_is_certified_with_the_mask_it_has() -> None:
    mask = torch.ones(512, 512, dtype=torch.bool).tril().view(1, 1, 512, 512)
    report = rewrite(torch.export.export(Masked(mask), qkv(rows=500, keys=512)), profit=False)[1]
    assert "causal 12" in report.fused[0].what
    assert report.fused[0].certificate.shape
