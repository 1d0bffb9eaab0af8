"""Test settings shared by every folder. torch is imported only for tests that ask for a device: simulator
tests must run in a process without it."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("support")
from support import grids  # noqa: E402

# Derandomised: a failure seen once is seen by everybody, and the suite never fails by bad luck.
settings.register_profile(
    "entrgi",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("entrgi")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors are tiny: handing their work to other threads costs more than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torch_devices() -> list[str]:
    """Devices for torch tests, from ENTRGI_TEST_DEVICE = auto (default) | cpu | cuda | sim (torch on the CPU)."""
    import torch

    choice = os.environ.get("ENTRGI_TEST_DEVICE", "auto")
    if choice not in ("auto", "cpu", "cuda", "sim"):
        raise pytest.UsageError(f"ENTRGI_TEST_DEVICE must be auto, cpu, cuda or sim, got {choice!r}")
    if choice == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("ENTRGI_TEST_DEVICE=cuda, but torch sees no CUDA device")
    if choice == "cuda":
        return ["cuda"]
    return ["cpu", "cuda"] if choice == "auto" and torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", torch_devices(), scope="session")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = grids.choose(items)


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the garbage collector need not go through it again with every collection,
    which took a third of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Signals as a terminal delivers them: under nohup or in the background some are ignored, in every process that the
    tests start, too. And no width of a terminal, which pytest-xdist gives its processes."""
    os.environ.pop("COLUMNS", None)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
