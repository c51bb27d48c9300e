"""Targets: named, parsed, and read off a device; none need be present."""

from __future__ import annotations

import pytest
import torch

from attnfuse.errors import BadInput
from attnfuse.target import KINDS, Target


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:sm90", "cuda:sm120", "rocm:gfx942", "xpu", "xpu:pvc"])
def test_parse_undoes_str(name: str) -> None:
    assert str(Target.parse(name)) == name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_alone(kind: str) -> None:
    assert Target.parse(kind) == Target(kind)


@pytest.mark.parametrize("name", ["", "tpu", "sm90", "CUDA", ":sm90", "cuda sm90", "mps"])
def test_an_unknown_kind_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(BadInput, match=rf"unknown target '{name}'; a target is one of cpu, cuda, rocm, xpu"):
        Target.parse(name)


def test_a_cpu_has_no_architecture() -> None:
    with pytest.raises(BadInput, match="cpu takes no architecture"):
        Target.parse("cpu:avx512")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_an_accelerator_run_on_the_cpu(device: str) -> None:
    assert Target.of(torch.device(device)) == Target("cpu")


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(BadInput, match="no kernels for device type 'mps'"):
        Target.of(torch.device("mps"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_an_absent_gpu_is_a_target_of_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert Target.of(torch.device("cuda")) == Target("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert Target.of(torch.device("cuda")) == Target("rocm")
    assert Target.of(torch.device("xpu")) == Target("xpu")


def test_a_present_gpu_is_asked_for_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert Target.current() == Target("cuda", "sm90")


@pytest.mark.usefixtures("no_gpu")
def test_the_machine_without_a_gpu_is_a_cpu() -> None:
    assert Target.current() == Target("cpu")


@pytest.mark.usefixtures("no_gpu")
def test_an_intel_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert Target.current() == Target("xpu")
