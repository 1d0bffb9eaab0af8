"""`warm_up`: which device it asks for, and what it says where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from entrgi_ext import ops, warm_up

PRESENT = torch.cuda.is_available()


@pytest.fixture
def warmed(monkeypatch):
    """A machine with two CUDA devices, the second of them current, and operators that only note what they are asked."""
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(ops, "_ops", SimpleNamespace(warm_up=devices.append))
    monkeypatch.setattr(ops.registration, "loaded_libraries", lambda: {"cpu": None, "cuda": None})
    return devices


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, [1]), ("cuda", [1]), ("cuda:0", [0]), (torch.device("cuda:1"), [1]), (0, [0]), ("cpu", [])],
)
def test_the_device_that_is_warmed_up(warmed, asked, expected):
    warm_up(asked)
    assert warmed == expected


def test_operators_that_are_not_loaded(warmed, monkeypatch):
    monkeypatch.setattr(ops.registration, "loaded_libraries", lambda: {"cpu": None, "cuda": "no nvcc at build time"})
    with pytest.raises(RuntimeError, match="warm_up: the CUDA operators are not loaded: no nvcc at build time"):
        warm_up("cuda:0")
    warm_up("cpu")
    assert warmed == []


def test_other_devices(warmed):
    with pytest.raises(ValueError, match="device must be a CUDA device, the CPU or None, got meta"):
        warm_up("meta")


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warm_up()
    warm_up("cpu")
    with pytest.raises(RuntimeError, match="can use no CUDA device here, got cuda:1"):
        warm_up("cuda:1")


@pytest.mark.skipif(
    PRESENT or ops.registration.loaded_libraries()["cuda"] is not None, reason="needs the library alone"
)
def test_the_library_reports_what_cuda_says():
    """The operator exists, and reaches the driver that is not there."""
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.ops.entrgi.warm_up(0)


@pytest.mark.gpu
@pytest.mark.skipif(not PRESENT, reason="needs a CUDA device")
def test_every_device_and_twice():
    for index in (*range(torch.cuda.device_count()), 0):
        before = torch.cuda.current_device()
        warm_up(index)
        assert torch.cuda.current_device() == before
