"""The certificate: equal sites once, within its budget, as hard as it was asked to be."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from attnfuse import rewrite
from attnfuse.errors import NotEquivalent
from attnfuse.passes.certify import check
from attnfuse.passes.certify.errors import compare
from attnfuse.report import Fused, Report


class Layers(nn.Module):
    """``count`` equal layers of causal attention, and one with another scale."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril()
        for scale in (*[0.3] * self.count, 0.4):
            q = torch.softmax((q @ k.mT * scale).masked_fill(~keep, float("-inf")), dim=-1) @ v
        return q


def report_of(count: int, length: int, **options: str) -> Report:
    args = tuple(torch.randn(1, 2, length, 8) for _ in range(3))
    _, report = rewrite(torch.export.export(Layers(count), args), custom_op=True, profit=False, **options)
    return report


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every replay that is made."""
    made: list[object] = []
    right = check._replayed
    monkeypatch.setattr(check, "_replayed", lambda pair: made.append(pair) or right(pair))
    return made


def test_equal_sites_are_replayed_once(replays: list[object]) -> None:
    report = report_of(count=6, length=9)
    assert len(report.fused) == 7
    assert len(replays) == 2
    assert len({site.certificate for site in report.fused[:6]}) == 1


def test_switched_off_nothing_is_replayed_and_the_report_says_so(replays: list[object]) -> None:
    report = report_of(count=1, length=9, certify="off")
    assert [site.certificate.skipped for site in report.fused] == ["switched off"] * 2
    assert not replays


#: 1 x 2 x 512 x 512 scores: more than quick replays at full size, and fewer than full does.
LENGTH = 512


@pytest.mark.parametrize(("certify", "length"), [("quick", 61), ("full", LENGTH)])
def test_quick_replays_big_sites_at_smaller_sizes(certify: str, length: int) -> None:
    for site in report_of(count=1, length=LENGTH, certify=certify).fused:
        assert site.certificate.fused_max > 0
        assert (f"{length}, 8]" in site.certificate.shape) == (certify == "quick")


@pytest.mark.parametrize("certify", ["quick", "full"])
def test_a_site_of_any_size_is_certified_in_seconds(certify: str) -> None:
    """A million million scores could not be replayed at all; 2 x 16384 x 16384 would take a minute."""
    began = time.perf_counter()
    report = report_of(count=1, length=16384, certify=certify)
    # what else is done takes a second; a minute would be a budget that is not kept, on however busy a machine
    assert time.perf_counter() - began < 30
    assert [type(site) for site in report.sites] == [Fused] * 2
    assert all("61, 8]" in site.certificate.shape for site in report.fused)


def test_a_certificate_names_its_inputs_and_errors() -> None:
    (certificate, _) = (site.certificate for site in report_of(count=1, length=9).fused)
    assert certificate.inputs == ("plain", "loud", "masked", "masked by ones", "filled")
    assert 0 < certificate.fused_mean <= certificate.fused_max
    assert 0 < certificate.source_mean <= certificate.source_max


# --- how far off is too far ---------------------------------------------------------------------------


def test_luck_of_the_source_is_no_yardstick() -> None:
    exact = torch.full((4,), 1000.0, dtype=torch.float64)
    source, fused = exact.float(), exact.float() + 0.01
    with pytest.raises(NotEquivalent, match=r"mean error 0\.01"):
        compare("it", source, fused, exact)
    with pytest.raises(NotEquivalent, match=r"mean error 0\.01"):
        compare("it", source, fused, exact, moved=[lambda: exact + 1e-4])
    assert compare("it", source, fused, exact, moved=[lambda: exact, lambda: exact + 0.01]).fused_max == pytest.approx(
        0.01, rel=0.1
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_where_the_source_is_is_wrong(wrong: float) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    fused = exact.float()
    fused[2] = wrong
    with pytest.raises(NotEquivalent):
        compare("it", exact.float(), fused, exact, moved=[lambda: exact])


def test_a_program_that_fails_by_itself_is_refused_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object) -> list[Tensor]:
        raise RuntimeError("expected scalar type Float but found BFloat16\nand more")

    monkeypatch.setattr(check, "_observed", failing)
    reasons = {site.reason for site in report_of(count=1, length=9).refused}
    assert reasons == {"the program itself fails: expected scalar type Float but found BFloat16"}
