"""Kernels compiled as the build of the package compiles them, for their machine code."""

import sys

import pytest

from support.build_simulated import ROOT, SOURCES, Unavailable, find_nvcc


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
