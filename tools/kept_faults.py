#!/usr/bin/env python
"""Fifty one-line faults that the test suite must catch: ``python tools/kept_faults.py``, by hand and once a week.

Each is put into a copy of the source tree, the tests named beside it are run there, and at least one has to fail.
Faults below ``csrc/`` are compiled into the CPU library of the copy (no CUDA, about half a minute each).
Exit code 1 where a fault is missed, or where its line is no longer found.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kept_faults_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "cmake", "entrgi_ext", "python", "tests", "benchmarks", "tools")
FILES = ("CMakeLists.txt", "pyproject.toml", "setup.py", "README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="names alone")
    parser.add_argument("--only", metavar="TEXT", help="faults whose name or file holds this")
    parser.add_argument("--start", type=int, default=1, metavar="N", help="begin with the N-th of them")
    parser.add_argument("--check", action="store_true", help="only look whether every line and test file is found")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.only or arguments.only in f"{fault.name} {fault.file}"]
    if arguments.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in chosen))
        return 0
    lost = [fault for fault in chosen if ROOT.joinpath(fault.file).read_text(encoding="utf-8").count(fault.line) != 1]
    for fault in lost:
        print(f"{fault.file}: expected {fault.line!r} once ({fault.name})")
    for fault in chosen:
        for test in fault.tests.split():
            if not ROOT.joinpath(test).is_file():
                print(f"no test file {test} ({fault.name})")
                lost.append(fault)
    if lost or arguments.check:
        return int(bool(lost))
    with tempfile.TemporaryDirectory(prefix="kept-faults-") as folder:
        return run(chosen, arguments.start, Path(folder))


def run(faults: list[Fault], start: int, copy: Path) -> int:
    """Try each fault in a copy of the tree; the number of those that are missed decides the exit code."""
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    missed = []
    for number, fault in enumerate(faults[start - 1 :], start):
        begun = time.monotonic()
        caught = is_caught(fault, copy)
        missed += [] if caught else [fault]
        verdict = "caught" if caught else "MISSED"
        print(f"{number:2d}/{len(faults)} {verdict} in {time.monotonic() - begun:3.0f} s: {fault.name}", flush=True)
    for fault in missed:
        print(f"missed: {fault.file}: {fault.name} (by {fault.tests})")
    return int(bool(missed))


def is_caught(fault: Fault, copy: Path) -> bool:
    """Whether one of its tests fails; whatever is changed is put back."""
    file = copy / fault.file
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace(fault.line, fault.instead), encoding="utf-8")
    library = copy / "entrgi_ext" / "libentrgi_cpu.so"
    compiled = library.read_bytes() if fault.is_compiled else b""
    try:
        if fault.is_compiled:
            build(copy)
        return not passes(fault, copy)
    finally:
        file.write_text(before, encoding="utf-8")
        if fault.is_compiled:
            library.unlink()  # a process may have it open: a new file, not new contents
            library.write_bytes(compiled)


def build(copy: Path) -> None:
    """Compile the CPU library of the copy."""
    folder = copy / "build"
    configure = ["cmake", "-S", ".", "-B", folder, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    configure += ["-DENTRGI_CUDA=0", f"-DENTRGI_OUTPUT={copy / 'entrgi_ext'}"]
    for command in (configure, ["cmake", "--build", folder]):
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {result.stdout[-2000:]}{result.stderr[-2000:]}")


def passes(fault: Fault, copy: Path) -> bool:
    """Whether all of its tests pass; no test at all is an error."""
    path = os.pathsep.join([str(copy / "python"), str(copy)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests.split()]
    if fault.only:
        command += ["-k", fault.only]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1, 2):  # 2: a fault may keep a test from being collected
        raise RuntimeError(f"{' '.join(command)}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
