"""The curves of a trace as a figure: reward, entropy and entropy weight over the denoising steps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from entrgi.files import replacing
from entrgi.trace import Run, Trace, TrajectoryStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#6f7681", "#c2571a", "#0f7b6c", "#7a4fb0")
PANELS = (
    ("reward", "Reward", "relaxed; dots: final texts"),
    ("entropy", "Entropy", "mean over masked, nats"),
    ("weight", "Entropy weight", "mean over masked"),
)
THIN_LINES = 32  # more trajectories than these are shown by their mean alone

Curve = list[tuple[int, float]]


def check(path: Path, label: str = "plot") -> None:
    """Raise before anything is computed.

    Args:
        label: the beginning of an error.

    Raises:
        ValueError: for a file whose ending names no format.
        ImportError: without matplotlib, with the command that installs it.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{label}: expected a file name ending in {', '.join(FORMATS)}, got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ImportError(f"{label} needs matplotlib: pip install 'entrgi[plot]'")


def write(path: Path, trace: Trace) -> None:
    """Write the figure as a whole; its format is that of the file's ending.

    Raises:
        ValueError: for a trace without a single finished step; see :func:`check` for others.
    """
    check(path)
    from matplotlib import rc_context

    drawn = figure(trace)
    # The same trace gives the same file: no date, no random names.
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "entrgi"}):
        drawn.savefig(temporary, dpi=160, metadata=dates.get(path.suffix.lower()))


def figure(trace: Trace) -> Figure:
    """One panel for every quantity that the trace has numbers for; means over all trajectories are strong."""
    from matplotlib.figure import Figure

    curves = {name: [trajectory_curves(run, name) for run in trace.runs] for name, _, _ in PANELS}
    panels = [panel for panel in PANELS if any(curves[panel[0]])]
    if not panels:
        raise ValueError("trace: expected at least one finished step to draw, got none")
    result = Figure(figsize=(4.2 * len(panels), 3.1), layout="constrained")
    for axes, (name, title, label) in zip(result.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, run in enumerate(trace.runs):
            draw(axes, run, curves[name][index], COLOURS[index % len(COLOURS)])
            if name == "reward":
                mark_final(axes, run, COLOURS[index % len(COLOURS)], column=index + 1)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("denoising step", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e3de", linewidth=0.7)
        axes.set_axisbelow(True)
        if name != "reward":
            axes.set_ylim(bottom=0)
    result.axes[0].legend(frameon=False, fontsize=8)
    return result


def trajectory_curves(run: Run, name: str) -> list[Curve]:
    """For each trajectory that has any: (steps done, value), the mean over its masked positions."""
    curves: dict[tuple[int, int], Curve] = {}
    for step in run.steps:
        for part in step.trajectories:
            value = quantity(part, name)
            if value is not None:
                curves.setdefault((part.prompt, part.trajectory), []).append((step.step + 1, value))
    return [curves[key] for key in sorted(curves)]


def quantity(part: TrajectoryStep, name: str) -> float | None:
    """``reward``, or the mean ``entropy`` or ``weight`` over the masked positions; None where there is none."""
    if name == "reward":
        return part.reward
    values = [x for x in getattr(part, name) or () if x is not None]
    return sum(values) / len(values) if values else None


def mean_curve(curves: list[Curve]) -> Curve:
    """At every step in which any trajectory took part, the mean of those that did."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            values.setdefault(step, []).append(value)
    return [(step, sum(values[step]) / len(values[step])) for step in sorted(values)]


def draw(axes: Axes, run: Run, curves: list[Curve], colour: str) -> None:
    if not curves:
        return
    for curve in curves if 1 < len(curves) <= THIN_LINES else ():
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(*zip(*mean_curve(curves), strict=True), color=colour, linewidth=2, label=run.name)


def mark_final(axes: Axes, run: Run, colour: str, column: int) -> None:
    """The rewards of the final texts as dots right of the last step, run by run, and their mean as a bar."""
    rewards = [reward for result in run.results for reward in result.rewards if reward is not None]
    if not rewards:
        return
    width = int(run.config["steps"]) * 0.04
    x = int(run.config["steps"]) + width * column
    label = None if any(line.get_label() == run.name for line in axes.lines) else run.name
    axes.scatter([x] * len(rewards), rewards, s=14, color=colour, alpha=0.6, linewidths=0, label=label, zorder=3)
    axes.plot([x - width * 0.4, x + width * 0.4], [sum(rewards) / len(rewards)] * 2, color=colour, linewidth=2)
