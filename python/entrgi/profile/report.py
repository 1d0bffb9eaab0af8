"""A profile as a table and as plain data."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from entrgi.config import SamplerConfig
from entrgi.doctor import driver_version
from entrgi.profile.profiler import IDLE, Part, Profile


def table(profile: Profile, device: torch.device) -> Group:
    """One row for every part, then the step, and below them what was measured where."""
    result = Table(show_footer=True, title="One denoising step", title_justify="left", title_style="bold")
    result.add_column("part", "step", no_wrap=True)
    result.add_column("calls", justify="right")
    result.add_column("ms", milliseconds(profile.seconds), justify="right")
    result.add_column("share", justify="right")
    result.add_column("floor ms", milliseconds(profile.floor), justify="right")
    result.add_column("bound")
    result.add_column("ratio", times(profile.ratio), justify="right")
    for part in profile.parts:
        calls = f"{part.calls:.3g}" if part.calls else ""
        floor = "" if part.floor is None else milliseconds(part.floor)
        style = "dim" if part.name == IDLE else None
        cells = (calls, milliseconds(part.seconds), f"{part.share:.1%}", floor, part.bound or "", times(part.ratio))
        result.add_row(part.name, *cells, style=style)
    return Group(result, Text("\n".join(notes(profile, device)), style="dim"))


def notes(profile: Profile, device: torch.device) -> list[str]:
    """The shapes and the rates behind the numbers, a line each."""
    shapes, rates, rows = profile.shapes, profile.rates, profile.shapes["N"]
    sizes = [f"N {max(rows)} to {min(rows)}", f"V {shapes['V']} ({shapes['logits']})"]
    if shapes["d"] is not None:
        sizes.append(f"d {shapes['d']} ({shapes['embedding']})")
    products = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.matmul.items())
    runs = f"the median of {profile.repeats} runs" if profile.repeats > 1 else "run once"
    lines = [
        f"{', '.join(sizes)}; parameters {shapes['parameter_bytes'] / 1e6:,.0f} MB; "
        f"means over {len(profile.steps)} steps, each {runs}",
        f"{device_name(device)}: copies {rates.copy / 1e9:,.1f} GB/s "
        f"({rates.copy_bytes >> 20} MiB), products {products}",
    ]
    if device.type == "cpu" and hasattr(os, "getloadavg"):
        lines[-1] += f", load average {os.getloadavg()[0]:.1f}"
    if device.type == "cuda":
        host = sum(step.host_seconds for step in profile.steps) / len(profile.steps)
        lines.append(f"the host queues a step in {milliseconds(host)} ms")
    return lines


def as_dict(profile: Profile, device: torch.device, config: SamplerConfig) -> dict[str, Any]:
    """Everything, as JSON takes it; seconds, bytes, FLOPs, and rates per second."""
    options = {**asdict(config), "logits_dtype": config.logits_dtype and str(config.logits_dtype)}
    return {
        "entrgi": metadata.version("entrgi"),
        "torch": torch.__version__,
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "config": options,
        "repeats": profile.repeats,
        "shapes": profile.shapes,
        "rates": asdict(profile.rates),
        "step": {"seconds": profile.seconds, "floor": profile.floor, "ratio": profile.ratio},
        "parts": [asdict(part) for part in profile.parts],
        "steps": [asdict(step) for step in profile.steps],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def milliseconds(seconds: float) -> str:
    """Three significant digits; what is below a nanosecond is nothing."""
    ms = 1e3 * seconds
    if ms >= 100:
        return f"{ms:,.0f}"
    return f"{ms:.3g}" if ms >= 0.001 else "< 0.001"


def times(ratio: float | None) -> str:
    """``1.9x``."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def label(part: Part) -> str:
    """What stands behind a bar: ``57.1 ms, 1.9x``."""
    text = f"{milliseconds(part.seconds)} ms"
    return text if part.ratio is None else f"{text}, {times(part.ratio)}"
