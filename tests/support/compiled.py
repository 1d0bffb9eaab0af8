"""Kernels compiled as the build of the package compiles them, for their machine code; programs compiled once."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.build_simulated import ROOT, SOURCES, Unavailable, find_nvcc, one_at_a_time


def compile_command(*options: str, strict: bool = True) -> list[str]:
    """The compiler's command, with what reads the output of ptxas; skips the test where there is no compiler."""
    try:
        nvcc = find_nvcc()
        import cutlass_library
    except (Unavailable, ImportError) as reason:
        pytest.skip(f"kernels cannot be compiled here: {reason}")
    cutlass = f"{cutlass_library.__path__[0]}/source/include"
    launcher = [sys.executable, str(ROOT / "cmake" / "read_ptxas.py"), *(["--strict"] if strict else [])]
    flags = ["-O3", "-std=c++20", "-Xptxas=-v,-warn-spills", f"-I{SOURCES}", "-isystem", cutlass]
    return [*launcher, nvcc, *flags, *options]


def compiled_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills, by one of the processes of a test run for all."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with one_at_a_time(folder):
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    return folder
