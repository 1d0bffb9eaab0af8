"""Programs that the parent runs: facts about the machine, test selections, the profiler."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .build import ROOT
from .child import end_group

FACTS = {
    "gpu": [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,mig.mode.current",
        "--format=csv",
    ],
    "nvcc": ["nvcc", "--version"],
    "cmake": ["cmake", "--version"],
    "ninja": ["ninja", "--version"],
    "ncu": ["ncu", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
    "cuda-gdb": ["cuda-gdb", "--version"],
}
STUB_TESTS = "print('tests/kernels/test_made_up.py::test_it PASSED')"
TEST = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-m", ""]  # what is slow here is not there
_PROFILE = (
    *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all", "--csv", "--page", "raw"),
    *("--kernel-name", "regex:vocab_pass|relaxed_embedding|logit_update"),
)
_METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "lts__t_bytes.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__inst_executed_pipe_xu.sum",
    "regex:smsp__average_warps_issue_stalled_.*_per_issue_active",
)
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")
COUNTERS = (
    (*_PROFILE, "--metrics", ",".join(_METRICS)),
    (*_PROFILE, *(word for section in _SECTIONS for word in ("--section", section))),
)


@dataclass(frozen=True)
class Run:
    """What a program printed; ``status`` None where it was ended, ``why`` then says so."""

    status: int | None
    text: str
    why: str = ""


def run(
    command: list[object], seconds: float, environment: dict[str, str] | None = None, log: Path | None = None
) -> Run:
    """Runs a program in its own process group and ends all of it after ``seconds``."""
    log = log or Path(os.devnull)
    pipe = subprocess.PIPE if log == Path(os.devnull) else None
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=pipe or file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            preexec_fn=os.setpgrp,
        )
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
        status, why = process.returncode, ""
    except subprocess.TimeoutExpired:
        output, status, why = b"", None, f"ended after {time.monotonic() - began:.0f} s"
    end_group(process)
    text = (output or b"").decode(errors="replace") if pipe else log.read_text(errors="replace")
    return Run(status, text, why)


def selections(box: machine.Machine, hung: set[str]) -> list[tuple[str, list[str]]]:
    """(title, command) of the test runs; files of kernels that hung are left out."""
    if box.kind == machine.STUB:
        return [("kernel tests", [sys.executable, "-c", STUB_TESTS])]
    if box.dry:
        return [
            ("kernel tests", [*TEST, "tests/kernels/test_kernel_commit.py", "-k", "compute_90a and sizes0"]),
            ("graphs, waiting, large tensors", [*TEST, "tests/ops/test_on_cuda.py", "-k", "draw_afresh"]),
        ]
    families = {re.sub("_(sm90|sm80|simt)$", "", kernel) for kernel in hung}
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "kernels").glob("test_kernel_*.py"))
    kept = [file for file in files if not any(family in file for family in families)]

    def options(workers: int, seconds: int) -> list[str]:
        at_once = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        return [*TEST, *at_once, *(["--timeout", str(seconds)] if importlib.util.find_spec("pytest_timeout") else [])]

    return [
        ("kernel tests", [*options(8, 20), *kept, "-k", "not compute_80"]),
        (
            "graphs, waiting, large tensors",
            [*options(4, 60), "tests/ops/test_on_cuda.py", "tests/sampler/test_device.py"],
        ),
    ]


def counters(text: str) -> list[dict]:
    """Rows of ncu's raw page, one for each launch: the kernel and its metrics."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = []
    for row in csv.DictReader(lines[start:]):
        if not (row.get("ID") or "").isdigit():  # the line of units
            continue
        metrics = {name: value for name, value in row.items() if name and "__" in name}
        rows.append({"kernel": row.get("Kernel Name", "")[:160], **metrics})
    return rows
