"""The machine's speed: measured once, kept on disk, and never in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnfuse.kernels.cpu import calibrate, cost


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("ATTNFUSE_CALIBRATE", raising=False)
    monkeypatch.setenv("ATTNFUSE_CACHE", str(tmp_path / "cache"))
    calibrate.speed.cache_clear()
    yield tmp_path / "cache"
    calibrate.speed.cache_clear()


def _files(cache: Path) -> list[Path]:
    return list(cache.iterdir())


def test_a_measurement_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate.speed(torch.float32)
    assert first is not None
    assert 0 < first.product < 1000
    assert 0 < first.flash < 1000
    calibrate.speed.cache_clear()
    monkeypatch.setattr(calibrate, "_measured", lambda dtype: pytest.fail("measured again"))
    assert calibrate.speed(torch.float32) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"float32": 3}', '{"float32": {"product": "x", "flash": 1}}'])
def test_a_damaged_file_is_measured_over(cache: Path, damage: str) -> None:
    assert calibrate.speed(torch.float32) is not None
    (file,) = _files(cache)
    file.write_text(damage)
    calibrate.speed.cache_clear()
    assert calibrate.speed(torch.float32) is not None
    assert '"product"' in file.read_text()


def test_a_folder_that_cannot_be_made(cache: Path) -> None:
    cache.write_text("a file stands where the folder should be")
    assert calibrate.speed(torch.float32) is not None
    assert cache.read_text() == "a file stands where the folder should be"


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE_CALIBRATE", "0")
    assert calibrate.speed(torch.float32) is None
    assert cost.rates_of(torch.float32) == cost.FLOAT
    assert not cache.exists()


def test_only_the_ratio_to_products_is_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_measured", lambda dtype: calibrate.Speed(product=2.0, flash=3.0))
    rates = cost.rates_of(torch.bfloat16)
    assert rates.product == cost.BFLOAT16.product
    assert rates.flash == pytest.approx(1.5 * rates.product)
