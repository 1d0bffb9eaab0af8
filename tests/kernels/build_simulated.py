"""Builds the simulator and, for it, the bindings with all kernels as PTX. Compiled files are kept in build/sim."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"


class Unavailable(RuntimeError):
    """What the simulator needs is not on this machine."""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise Unavailable("nvcc was not found (looked in PATH and CUDA_HOME)")
    return nvcc


def simulator_command() -> tuple[list[str], dict[str, str]]:
    """The command that runs a program in the simulator with all checks, and its environment."""
    source = Path(os.environ.get("ENTRGI_CUDASIM", ROOT.parent / "shared" / "cudasim"))
    if not (source / "cudasim-run").exists():
        raise Unavailable(f"the CUDA simulator was not found in {source} (set ENTRGI_CUDASIM)")
    build = Path(os.environ.get("CUDASIM_BUILD", ROOT / "build" / "cudasim"))
    if not (build / "libcudart.so.13").exists():
        subprocess.run(["make", "-s", "-C", source, f"BUILD={build}"], check=True)
    return [str(source / "cudasim-run"), "--check"], {**os.environ, "CUDASIM_BUILD": str(build)}


def build_bindings(arch: str) -> Path:
    """Path of ``_bindings`` with the kernels as PTX of ``arch`` (such as "compute_90a")."""
    nvcc = find_nvcc()
    try:
        import cutlass_library
        import pybind11
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    cutlass = Path(cutlass_library.__file__).parent / "source" / "include"
    folder = ROOT / "build" / "sim" / arch
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*SOURCES.glob("kernels/**/*.h"), *SOURCES.glob("kernels/**/*.cuh")]
    newest_header = max(header.stat().st_mtime for header in headers)
    python = sysconfig.get_paths()["include"]
    common = [nvcc, "-O3", "-lineinfo", "--no-compress", "-cudart", "shared", "-Xcompiler", "-fPIC"]
    common += ["-gencode", f"arch={arch},code={arch}", f"-I{SOURCES}", f"-I{cutlass}", "-DENTRGI_WITH_CUDA"]
    common += [f'-DENTRGI_CUDA_ARCHITECTURES="{arch}"', f"-I{pybind11.get_include()}", f"-I{python}"]
    kernels = SOURCES / "kernels"
    objects = []
    for source in [*sorted(kernels.glob("*.cu")), kernels / "plan.cpp", SOURCES / "bindings" / "module.cpp"]:
        target = folder / f"{source.stem}.o"
        objects.append(target)
        newest = max(source.stat().st_mtime, newest_header)
        if not target.exists() or target.stat().st_mtime < newest:
            standard = "-std=c++17" if source.suffix == ".cu" else "-std=c++20"
            subprocess.run([*common, standard, "-c", source, "-o", target], check=True)
    library = folder / "_bindings.so"
    if not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        subprocess.run([*common, "-shared", *objects, "-o", library], check=True)
    return library


if __name__ == "__main__":
    for name in sys.argv[1:] or ["compute_80", "compute_90a"]:
        print(build_bindings(name))
