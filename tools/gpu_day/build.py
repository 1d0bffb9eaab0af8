"""The package's libraries: built in the background, else brought along, else missing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .child import end_group

ROOT = Path(__file__).resolve().parents[2]
BUILT, CARRIED, FOUND, NONE = "built", "brought along", "already there", "none"
CARRIED_SECONDS = 30.0  # to unpack and to compile the bindings
CHECK = """
import entrgi_ext, json
from entrgi_ext import _bindings
print(json.dumps({"problems": entrgi_ext.loaded_libraries(), "launchers": hasattr(_bindings, "launch")}))
"""


def cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def source_hash() -> str:
    """Of everything that the libraries are made from."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*"), *(ROOT / "csrc").rglob("*")]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)


def unpack_wheel(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def install_wheels(pack: Path, site: Path) -> list[str]:
    """Unpacks the wheels whose packages this interpreter lacks; pure Python needs no more than that."""
    installed = []
    for wheel in sorted((pack / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0].removesuffix(".py") for name in archive.namelist() if ".dist-info/" not in name}
            if all(importlib.util.find_spec(top) for top in tops):
                continue
        unpack_wheel(wheel, site)
        installed.append(wheel.name)
    return installed


@dataclass
class Build:
    """CMake and Ninja, started at once.

    Attributes:
        pack: the folder that ``pack`` made, if it is here.
        target: the folder that receives the libraries.
        environment: of the build, and under which the result is imported to see whether it works.
        command: builds into ``target``.
        cuda: whether the libraries must hold the CUDA operators.
    """

    pack: Path
    scratch: Path
    target: Path
    environment: dict[str, str]
    command: list[str]
    cuda: bool = True

    def __post_init__(self) -> None:
        self.log, self.began, self.why = self.scratch / "build.log", time.monotonic(), ""
        self.stamp = self.scratch / "built.json"
        self.process = None
        if self._stamped() == source_hash() and not self._broken():
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=self.environment,
                preexec_fn=os.setpgrp,
            )

    def wait(self, limit: float) -> str:
        """Where the libraries come from, at the latest a little after ``limit`` (``time.monotonic``)."""
        if self.process is None:
            return FOUND
        try:
            status = self.process.wait(max(limit - time.monotonic(), 0.1))
            self.why = f"the build ended with status {status}" if status else self._broken()
        except subprocess.TimeoutExpired:
            self.why = f"the build did not finish within {time.monotonic() - self.began:.0f} s"
        end_group(self.process)
        if not self.why:
            self.stamp.write_text(json.dumps({"sources": source_hash()}))
            return BUILT
        return self._carried()

    def _stamped(self) -> str | None:
        return json.loads(self.stamp.read_text())["sources"] if self.stamp.exists() else None

    def _broken(self) -> str:
        """Why the libraries in ``target`` cannot be used, empty where they can."""
        command = [sys.executable, "-c", CHECK]
        try:
            run = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, cwd="/")
        except subprocess.TimeoutExpired:
            return "the libraries do not load within 60 s"
        if run.returncode != 0:
            return (run.stderr.strip().splitlines() or ["the libraries do not load"])[-1]
        found = json.loads(run.stdout.splitlines()[-1])
        missing = found["problems"].get("cuda") or ("" if found["launchers"] else "the bindings hold no launchers")
        return missing if self.cuda else ""

    def _carried(self) -> str:
        archive, manifest = self.pack / "libraries.tar.xz", self.pack / "manifest.json"
        if not archive.exists():
            self.why += "; no libraries were brought along"
            return NONE
        sources = json.loads(manifest.read_text())["sources"]
        if sources != source_hash():
            self.why += f"; the libraries brought along are of other sources ({sources}, here {source_hash()})"
            return NONE
        unpack(archive, self.target)
        if problem := self._broken():
            problem = self._bindings() or self._broken()
            if problem:
                self.why += f"; those brought along: {problem}"
                return NONE
        return CARRIED

    def _bindings(self) -> str:
        """Compiles the bindings alone, for this interpreter; why that failed."""
        nvcc = shutil.which("nvcc")
        cuda = Path(nvcc).resolve().parents[1] if nvcc else cuda_home()
        module = self.target / f"_bindings{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = [
            *(os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"),
            *map(str, sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))),
            *("-o", str(module), f"-I{ROOT / 'csrc'}", f"-I{cuda / 'include'}"),
            *shlex.split(
                subprocess.run([sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True).stdout
            ),
            *("-DENTRGI_WITH_CUDA", "-DENTRGI_WITH_LAUNCHERS", '-DENTRGI_CUDA_ARCHITECTURES="sm_80,sm_90a,compute_90"'),
            *(
                f"-L{self.target}",
                "-lentrgi_kernels",
                f"-L{cuda / 'lib64'}",
                "-lcudart_static",
                "-ldl",
                "-lpthread",
                "-lrt",
            ),
            "-Wl,-rpath,$ORIGIN",
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=CARRIED_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as failure:
            return str(failure)
        with self.log.open("a") as log:
            log.write(run.stdout + run.stderr)
        return "" if run.returncode == 0 else f"the bindings do not compile: {run.stderr.strip()[-300:]}"


def cmake_command(
    scratch: Path, target: Path, cutlass: Path | None, jobs: int, bounded_waits: bool = False
) -> list[str]:
    """Configures and builds; with source lines, which a profiler and a trap name."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(scratch / "cmake"), "-G", "Ninja", "-DENTRGI_CUDA=1"]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DENTRGI_OUTPUT={target}"]
    configure += [
        "-DENTRGI_LINEINFO=ON",
        "-DENTRGI_LAUNCHERS=ON",
        f"-DENTRGI_BOUNDED_WAITS={'ON' if bounded_waits else 'OFF'}",
    ]
    if cutlass is not None:
        configure.append(f"-DENTRGI_CUTLASS_INCLUDE={cutlass}")
    build = ["cmake", "--build", str(scratch / "cmake"), "--parallel", str(jobs)]
    return ["sh", "-c", f"{shlex.join(configure)} && exec {shlex.join(build)}"]
