"""The fixture ``kernels``: the raw launchers, on a GPU or in the simulator (``ENTRGI_TEST_DEVICE=cuda|sim|auto``)."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from support.build_simulated import ROOT, Unavailable, build_bindings, simulator_command
from support.raw_kernels import RawKernels

ARCHITECTURES = ["compute_90a", "compute_80"]


def _load(name: str, path: Path, folders: list[str] | None = None):
    # By path: the tests of this layer need no built package.
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    if folders:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference():
    folder = ROOT / "entrgi_ext"
    _load("entrgi_reference", folder / "__init__.py", [str(folder)])  # which loads no library
    return importlib.import_module("entrgi_reference.reference")


@pytest.fixture(scope="session")
def bindings():
    """The bindings as they are built, with CUDA or without."""
    found = sorted((ROOT / "entrgi_ext").glob("_bindings*.so"))
    if not found:
        pytest.skip("entrgi_ext/_bindings is not built")
    return _load("_bindings", found[0])


def _device() -> str:
    wanted = os.environ.get("ENTRGI_TEST_DEVICE", "auto")
    if wanted not in ("cuda", "sim", "auto", "cpu"):
        raise ValueError(f"ENTRGI_TEST_DEVICE must be auto, cpu, cuda or sim, got {wanted}")
    if wanted == "auto" and torch.cuda.is_available():
        return "cuda"
    return "cuda" if wanted == "cuda" else "sim"


def _built_bindings() -> Path:
    found = sorted((ROOT / "entrgi_ext").glob("_bindings*.so"))
    if not found or not _load("_bindings", found[0]).has_cuda:
        raise Unavailable("entrgi_ext/_bindings is not built with CUDA")
    return found[0]


def pytest_generate_tests(metafunc):
    """The simulator runs the code of both architectures, a GPU its own; what only Hopper has is asked of Hopper."""
    if "kernels" in metafunc.fixturenames:
        hopper_alone = _device() == "cuda" or "hopper" in metafunc.fixturenames
        metafunc.parametrize("kernels", ARCHITECTURES[:1] if hopper_alone else ARCHITECTURES, indirect=True)


@pytest.fixture(scope="session")
def kernels(request):
    try:
        if _device() == "cuda":
            # Such as compute-sanitizer, whose findings are the worker's exit code.
            prefix = shlex.split(os.environ.get("ENTRGI_KERNEL_PREFIX", ""))
            worker = RawKernels(_built_bindings(), prefix, dict(os.environ))
        else:
            bindings = build_bindings(request.param)
            worker = RawKernels(bindings, *simulator_command())
    except Unavailable as reason:
        if os.environ.get("ENTRGI_TEST_DEVICE") in ("cuda", "sim"):
            raise
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    yield worker
    worker.close()


@pytest.fixture
def hopper(kernels):
    """The launchers, for what only Hopper's kernels have."""
    return kernels
