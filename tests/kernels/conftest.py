"""The fixture ``kernels``: the raw launchers, on a GPU or in the simulator (``ENTRGI_TEST_DEVICE=cuda|sim|auto``)."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from build_simulated import ROOT, Unavailable, build_bindings, simulator_command
from raw_kernels import RawKernels

ARCHITECTURES = ["compute_90a", "compute_80"]


def _reference():
    # By path: the tests of this layer need no built package.
    spec = importlib.util.spec_from_file_location("entrgi_reference", ROOT / "entrgi_ext" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference():
    return _reference()


def _device() -> str:
    wanted = os.environ.get("ENTRGI_TEST_DEVICE", "auto")
    if wanted not in ("cuda", "sim", "auto"):
        raise ValueError(f"ENTRGI_TEST_DEVICE must be cuda, sim or auto, got {wanted}")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "sim"
    return wanted


def _built_bindings() -> Path:
    found = sorted((ROOT / "entrgi_ext").glob("_bindings*.so"))
    if not found:
        raise Unavailable("entrgi_ext/_bindings is not built")
    return found[0]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def kernels(request):
    torch.set_num_threads(1)
    try:
        if _device() == "cuda":
            if request.param != ARCHITECTURES[0]:
                pytest.skip("the GPU runs its own architecture")
            worker = RawKernels(_built_bindings(), [], dict(os.environ))
        else:
            prefix, environment = simulator_command()
            worker = RawKernels(build_bindings(request.param), prefix, environment)
    except Unavailable as reason:
        if os.environ.get("ENTRGI_TEST_DEVICE", "auto") != "auto":
            raise
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    yield worker
    worker.close()
