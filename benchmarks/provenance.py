"""On what a benchmark ran: the columns that every result carries."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance(threads: int) -> dict[str, object]:
    """Processor, threads, load, torch version and git commit of this run."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    commit = git("rev-parse", "--short", "HEAD") or "none"
    return {
        "device": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": commit + ("-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""),
    }
