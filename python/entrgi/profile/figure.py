"""A profile as a figure: measured beside floor for every part, and how the steps become cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from entrgi.files import replacing
from entrgi.profile.profiler import IDLE, Profile
from entrgi.profile.report import label, milliseconds, notes, times

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "denoiser": "#3b6fb6",
    "reward forward": "#c2571a",
    "reward backward": "#e0995e",
    "sample_tokens": "#0f7b6c",
    "logit_statistics": "#3f9c8c",
    "gumbel_perturb": "#7fbfb2",
    "relaxed_embedding": "#58a05a",
    "logit_update": "#9cc46b",
    "commit": "#7a4fb0",
    IDLE: "#b4b8bf",
}
OTHER = "#8a8f98"
FLOOR = "#1d2126"


def write(path: Path, profile: Profile, device: torch.device) -> None:
    """Write the figure, whole or not at all."""
    drawn = figure(profile, device)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=160)


def figure(profile: Profile, device: torch.device) -> Figure:
    """Left: the mean step by parts, measured and floor. Right: every step, stacked, with its floor as a line."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(10.5, 0.42 * len(profile.parts) + 2.0), layout="constrained")
    left, right = result.subplots(1, 2, width_ratios=(1.25, 1))
    draw_parts(left, profile)
    draw_steps(right, profile)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
    result.supxlabel("\n".join(notes(profile, device)), fontsize=7, color="#555b63")
    return result


def draw_parts(axes: Axes, profile: Profile) -> None:
    """A pair of bars for every part."""
    longest = max(1e3 * max(part.seconds, part.floor or 0.0) for part in profile.parts)
    for place, part in enumerate(profile.parts):
        axes.barh(place - 0.14, 1e3 * part.seconds, 0.44, color=COLOURS.get(part.name, OTHER))
        if part.floor is not None:
            axes.barh(place + 0.22, 1e3 * part.floor, 0.2, color=FLOOR)
        end = 1e3 * max(part.seconds, part.floor or 0.0)
        axes.text(end + 0.012 * longest, place, label(part), va="center", fontsize=8)
    axes.set_yticks(range(len(profile.parts)), [part.name for part in profile.parts])
    axes.set_ylim(len(profile.parts) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xlabel("ms per denoising step; black: floor", fontsize=9)
    title = f"{milliseconds(profile.seconds)} ms, floor {milliseconds(profile.floor)} ms: {times(profile.ratio)}"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="x", color="#e3e3de", linewidth=0.7)


def draw_steps(axes: Axes, profile: Profile) -> None:
    """One stacked bar for every step."""
    places = [step.index for step in profile.steps]
    base = [0.0] * len(places)
    for part in profile.parts:
        heights = [1e3 * step.parts.get(part.name, 0.0) for step in profile.steps]
        axes.bar(places, heights, 0.9, bottom=base, color=COLOURS.get(part.name, OTHER))
        base = [a + b for a, b in zip(base, heights, strict=True)]
    floors = [1e3 * sum(step.floors.values()) for step in profile.steps]
    edges = [place - 0.5 for place in places] + [places[-1] + 0.5]
    axes.stairs(floors, edges, baseline=None, color=FLOOR, linewidth=1.4)
    axes.set_xlim(edges[0], edges[-1])
    cast(Any, axes.xaxis.get_major_locator()).set_params(integer=True)
    axes.set_ylim(bottom=0)
    first, last = profile.steps[0].rows, profile.steps[-1].rows
    axes.set_xlabel(f"denoising step (N = {first} rows in the first, {last} in the last)", fontsize=9)
    axes.set_ylabel("ms; line: floor", fontsize=9)
    axes.set_title("Step by step", loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="y", color="#e3e3de", linewidth=0.7)
