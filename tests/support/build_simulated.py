"""Builds the simulator and, for it, the bindings with all kernels as PTX. Compiled files are kept in build/sim."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Of processes that would build into ``folder`` at once, the first builds and the others find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def simulator_command() -> tuple[list[str], dict[str, str]]:
    """The command that runs a program in the simulator with all checks, and its environment."""
    source = Path(os.environ.get("ENTRGI_CUDASIM", ROOT.parent / "shared" / "cudasim"))
    if not (source / "cudasim-run").exists():
        raise Unavailable(f"the CUDA simulator was not found in {source} (set ENTRGI_CUDASIM)")
    build = Path(os.environ.get("CUDASIM_BUILD", ROOT / "build" / "cudasim"))
    with one_at_a_time(build):
        if not (build / "libcudart.so.13").exists():
            subprocess.run(["make", "-s", "-C", source, f"BUILD={build}"], check=True)
    return [str(source / "cudasim-run"), "--check"], {**os.environ, "CUDASIM_BUILD": str(build)}


def is_stale(target: Path) -> bool:
    """Whether something that an object was made from is newer than it, by the list that the compiler wrote."""
    listing = Path(f"{target}.d")
    if not target.exists() or not listing.exists():
        return True
    made_from = listing.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = target.stat().st_mtime
    return any(not Path(name).exists() or Path(name).stat().st_mtime > built for name in made_from)


def compiler(arch: str) -> list[str]:
    """The compiler's command for kernels as PTX of ``arch`` (such as "compute_90a") and their bindings."""
    nvcc = find_nvcc()
    try:
        import cutlass_library
        import pybind11
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    cutlass = Path(cutlass_library.__file__).parent / "source" / "include"
    python = sysconfig.get_paths()["include"]
    common = [nvcc, "-O3", "-lineinfo", "--no-compress", "-cudart", "shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    common += [
        "-std=c++20",
        "-gencode",
        f"arch={arch},code={arch}",
        f"-I{SOURCES}",
        f"-I{cutlass}",
        "-DENTRGI_WITH_CUDA",
    ]
    return [*common, f'-DENTRGI_CUDA_ARCHITECTURES="{arch}"', f"-I{pybind11.get_include()}", f"-I{python}"]


def build_bindings(arch: str) -> Path:
    """Path of ``_bindings`` with the kernels as PTX of ``arch`` (such as "compute_90a")."""
    common = compiler(arch)
    folder = ROOT / "build" / "sim" / arch
    with one_at_a_time(folder.parent):
        return _built(common, folder)


def _built(common: list[str], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    sources = [path for name in ("kernels", "bindings") for path in sorted((SOURCES / name).glob("*.c*"))]
    sources = [source for source in sources if source.suffix in (".cu", ".cpp")]
    objects = [folder / f"{source.stem}{source.suffix}.o" for source in sources]
    stale = [(source, target) for source, target in zip(sources, objects, strict=True) if is_stale(target)]

    def compile_one(pair: tuple[Path, Path]) -> None:
        source, target = pair
        subprocess.run([*common, "-MD", "-MF", f"{target}.d", "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, stale))
    library = folder / "_bindings.so"
    if not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        subprocess.run([*common, "-shared", *objects, "-o", library], check=True)
    return library


if __name__ == "__main__":  # ahead of tests that run in several processes
    try:
        simulator_command()
        for name in sys.argv[1:] or ["compute_80", "compute_90a"]:
            print(build_bindings(name).relative_to(ROOT))
    except Unavailable as reason:
        print(f"CUDA kernels cannot be run here: {reason}")
