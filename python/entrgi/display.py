"""How the command line shows things: tables, progress, JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from entrgi.config import SamplerConfig
from entrgi.doctor import Report
from entrgi.outputs import Output, StepState

REFRESH_SECONDS = 0.1
OnStep = Callable[[StepState], None]


def doctor_table(report: Report) -> Table:
    """Two columns: what, and what was found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.facts.items():
        table.add_row(name, value)
    return table


@contextmanager
def progress(console: Console, enabled: bool) -> Iterator[Callable[[str, int], OnStep]]:
    """A bar for every generation over its T steps, with the running reward and mean entropy weight.

    Yields ``track(name, steps)``, which adds a bar and returns a callback for ``callback_on_step_end``.
    """
    columns = (
        TextColumn("{task.description:>11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console, disable=not enabled) as bars:

        def track(name: str, steps: int) -> OnStep:
            bar = bars.add_task(name, total=steps, numbers="")
            shown = 0.0

            def on_step(state: StepState) -> None:
                # Reading a number waits for the device, so it is not done at every step.
                nonlocal shown
                last = state.step + 1 == state.steps
                if not last and time.monotonic() - shown < REFRESH_SECONDS:
                    return
                shown = time.monotonic()
                numbers = ""
                if state.reward is not None:
                    numbers = f"reward {state.reward.item():+.2f}  weight {state.weight.item():.2f}"
                bars.update(bar, completed=state.step + 1, numbers=numbers)

            return on_step

        yield track


def report(prompts: list[str], outputs: dict[str, Output]) -> Iterator[RenderableType]:
    """One table for each prompt, the runs side by side, with Top@1 and Avg@N below."""
    for b, prompt in enumerate(prompts):
        table = Table(title=Text(repr(prompt)), title_justify="left", title_style="bold", show_footer=True)
        for name, output in outputs.items():
            table.add_column(name, Text(f"Avg@{output.rewards.shape[1]}\nTop@1"), ratio=1)
            average, best = output.avg[b].item(), output.top1[b].item()
            table.add_column("reward", f"{average:+.2f}\n{best:+.2f}", justify="right")
        first = next(iter(outputs.values()))
        for k in range(first.rewards.shape[1]):
            cells = []
            for output in outputs.values():
                value = output.rewards[b, k].item()
                cells += [Text(output.texts[b][k]), "-" if math.isnan(value) else f"{value:+.2f}"]
            table.add_row(*cells)
        yield table


def as_dict(prompts: list[str], config: SamplerConfig, output: Output) -> dict:
    """A generation as plain data; numbers that do not exist (an interrupted run's rewards) are None."""

    def number(x: float) -> float | None:
        return None if math.isnan(x) else x

    results = [
        {
            "prompt": prompt,
            "texts": output.texts[b],
            "responses": output.responses[b],
            "rewards": [number(x) for x in output.rewards[b].tolist()],
            "top1": number(output.top1[b].item()),
            "avg": number(output.avg[b].item()),
            "trajectory_seeds": output.seeds[b].tolist(),
        }
        for b, prompt in enumerate(prompts)
    ]
    options = {**asdict(config), "logits_dtype": config.logits_dtype and str(config.logits_dtype)}
    return {
        "version": metadata.version("entrgi"),
        "complete": output.complete,
        "config": options,
        "results": results,
        "history": asdict(output.history),
        "timings": output.timings,
    }
