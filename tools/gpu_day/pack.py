"""What a machine without a network lacks, as one folder: libraries, CUTLASS's headers, wheels."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from .build import ROOT, cuda_home, source_hash, unpack, unpack_wheel

MOST_BYTES = 40 << 20
LIBRARIES = ("libentrgi_kernels.so", "libentrgi_cuda.so", "libentrgi_cpu.so")
# What tests and benchmarks import beyond PyTorch, transformers and pytest; pure Python. What is there already is not
# replaced.
WHEELS = ("rich", "markdown-it-py", "mdurl", "lazy-loader", "expecttest", "vaderSentiment")
# Python versions for which the bindings travel ready-made, where this machine can make them.
PYTHONS = ("3.12",)


class Unusable(RuntimeError):
    """The folder would not do."""


def pack(folder: Path) -> list[str]:
    """Makes ``folder`` anew and checks it; what was found, line by line.

    Raises:
        Unusable: libraries that are missing or older than the sources, a folder that is too large or does not work.
    """
    libraries = [_current(ROOT / "entrgi_ext" / name) for name in LIBRARIES]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    notes = []
    with tempfile.TemporaryDirectory() as scratch:
        bindings, problem = _bindings(Path(scratch))
        notes += [f"bindings for Python {version}: made here" for version in bindings] or [f"bindings: {problem}"]
        archive(folder / "libraries.tar.xz", [*libraries, *bindings.values()])
    include = cutlass_headers()
    if include is None:
        raise Unusable("CUTLASS's headers were not found: pip install --no-deps nvidia-cutlass")
    archive(folder / "cutlass.tar.xz", [include / "cute", include / "cutlass"])
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    constraints = ["-c", str(ROOT / "constraints.txt")] if (ROOT / "constraints.txt").exists() else []
    subprocess.run([*command, *constraints, "-d", str(folder / "wheels"), *WHEELS], check=True)
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", ".", ":!benchmarks/results"):
        commit += "-dirty"
    (folder / "manifest.json").write_text(json.dumps({"sources": source_hash(), "commit": commit}))
    return notes + check(folder)


def check(folder: Path) -> list[str]:
    """Unpacks the folder into a fresh environment and imports what is in it.

    The environment is one of this Python without any package; PyTorch, which the operators link, is lent by path. It
    shows that the archives are whole, that the wheels import without what is not in the folder, that the CPU operators
    run and that the CUDA operators and the launchers load. What they do on a GPU it cannot show.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise Unusable(f"the folder has {size / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} are meant to travel")
    notes = [f"{size / 2**20:.1f} MiB of {MOST_BYTES >> 20}"]
    with tempfile.TemporaryDirectory() as scratch:
        fresh, site, package = Path(scratch, "venv"), Path(scratch, "site"), Path(scratch, "package", "entrgi_ext")
        for wheel in (folder / "wheels").glob("*.whl"):
            unpack_wheel(wheel, site)
        shutil.copytree(ROOT / "entrgi_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        unpack(folder / "libraries.tar.xz", package)
        unpack(folder / "cutlass.tar.xz", Path(scratch, "cutlass"))
        for header in ("cute/tensor.hpp", "cutlass/cutlass.h"):
            if not Path(scratch, "cutlass", header).exists():
                raise Unusable(f"{header} is not among CUTLASS's headers")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
        python, suffix = fresh / "bin" / "python", sysconfig.get_config_var("EXT_SUFFIX")
        own = next((ROOT / "entrgi_ext").glob(f"_bindings*{suffix}"))
        shutil.copy(own, package)  # of this interpreter; those for others are tried below
        _run([python, "-c", "import rich, markdown_it, lazy_loader, expecttest, vaderSentiment.vaderSentiment"], site)
        torch = Path(importlib.util.find_spec("torch").origin).parents[1]
        _run([python, "-c", IMPORT], site, package.parent, torch)
        notes.append("wheels import; CPU operators run, CUDA operators and launchers load in a fresh environment")
        for version in PYTHONS:
            name = _bindings_name(version)
            if (package / name).exists():
                interpreter = _interpreter(version)
                _run([interpreter, "-c", f"import sys; sys.path.insert(0, {str(package)!r}); import _bindings; {PLAN}"])
                notes.append(f"bindings for Python {version} import and plan")
    return notes


IMPORT = """
import torch, entrgi_ext
from entrgi_ext import _bindings
problems = {name: why for name, why in entrgi_ext.loaded_libraries().items() if why}
assert not problems, problems
assert hasattr(_bindings, 'launch')
assert torch.isfinite(entrgi_ext.logit_statistics(torch.randn(2, 50), 0.7).logsumexp).all()
"""
PLAN = "assert _bindings.launch and _bindings.plan('sample_tokens', 8, 152064)['kernel']"


def _run(command: list[object], *paths: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd="/")
    if run.returncode != 0:
        raise Unusable(f"{' '.join(map(str, command))[:100]}: {run.stderr.strip()[-1500:]}")


def _current(library: Path) -> Path:
    """The library, where nothing it was made from is newer."""
    if not library.exists():
        raise Unusable(f"{library.relative_to(ROOT)} is missing: build the package with CUDA first (make build)")
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "cmake").glob("*"), ROOT / "CMakeLists.txt"]
    newer = [file for file in sources if file.is_file() and file.stat().st_mtime > library.stat().st_mtime]
    if newer:
        raise Unusable(
            f"{newer[0].relative_to(ROOT)} is newer than {library.name}: build the package first (make build)"
        )
    return library


def _bindings(scratch: Path) -> tuple[dict[str, Path], str]:
    """The bindings for other Pythons whose headers are on this machine, by version; why some are not there."""
    made, problem = {}, ""
    for version in PYTHONS:
        if (python := _interpreter(version)) is None:
            problem = f"no Python {version} here; they are compiled where they are needed"
            continue
        include = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"], capture_output=True, text=True
        ).stdout.strip()
        pybind11 = subprocess.run(
            [sys.executable, "-c", "import pybind11; print(pybind11.get_include())"], capture_output=True, text=True
        ).stdout.strip()
        nvcc = shutil.which("nvcc") or str(cuda_home() / "bin" / "nvcc")
        target = scratch / _bindings_name(version)
        command = [
            *(nvcc, "-std=c++20", "-O2", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"),
            *map(str, sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))),
            *("-o", str(target), f"-I{ROOT / 'csrc'}", f"-I{include}", f"-I{pybind11}"),
            *("-DENTRGI_WITH_CUDA", "-DENTRGI_WITH_LAUNCHERS"),
            '-DENTRGI_CUDA_ARCHITECTURES="sm_80,sm_90a,compute_90"',
            *(f"-L{ROOT / 'entrgi_ext'}", "-lentrgi_kernels", "-Xlinker", "-rpath,$ORIGIN"),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            made[version] = target
        else:
            problem = f"Python {version}: {run.stderr.strip()[-300:]}"
    return made, problem


def _interpreter(version: str) -> str | None:
    """A Python of this version that starts and has its headers."""
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}")]
    probe = "import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_paths()['include'] + '/Python.h'))"
    for place in filter(None, places):
        if subprocess.run([place, "-c", probe], capture_output=True).returncode == 0:
            return str(place)
    return None


def _bindings_name(version: str) -> str:
    tag = "".join(version.split("."))
    return f"_bindings.cpython-{tag}-x86_64-linux-gnu.so"


def cutlass_headers() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    include = Path(spec.origin).parent / "source" / "include" if spec else None
    return include if include and include.exists() else None


def archive(target: Path, paths: list[Path], preset: int = 6) -> None:
    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(target, "w:xz", preset=preset) as tar:
        for path in paths:
            tar.add(path, path.name, filter=plain)


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "none"
