"""How the command line shows things: tables, progress, JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from entrgi.trace import plain_options

if TYPE_CHECKING:
    from entrgi.config import SamplerConfig
    from entrgi.outputs import Output, StepState
    from entrgi.prompts import Prompt

REFRESH_SECONDS = 0.1
OnStep = Callable[["StepState"], None]


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
                last = state.step + 1 >= state.steps
                if not last and time.monotonic() - shown < REFRESH_SECONDS:
                    return
                shown = time.monotonic()
                numbers = ""
                reward, weight = state.reward.nanmean().item(), state.weight.nanmean().item()
                if not math.isnan(reward):
                    numbers = f"reward {reward:+.2f}  weight {weight:.2f}"
                bars.update(bar, total=state.steps, completed=state.step + 1, numbers=numbers)

            return on_step

        yield track


def report(prompts: Sequence[Prompt], outputs: dict[str, Output]) -> Iterator[RenderableType]:
    """Each prompt, and a table of its texts: the runs side by side, with Avg@K and Top@1 below.

    A run that was interrupted may have come to fewer prompts than the first.
    """
    for b, prompt in enumerate(prompts):
        yield Text(title(prompt), style="bold")
        table = Table(show_footer=True)
        for name, output in outputs.items():
            table.add_column(name, Text(f"Avg@{output.rewards.shape[1]}\nTop@1"), ratio=1)
            means = (output.avg[b].item(), output.top1[b].item()) if b < len(output.texts) else (math.nan, math.nan)
            table.add_column("reward", "\n".join(map(signed, means)), justify="right")
        first = next(iter(outputs.values()))
        for k in range(first.rewards.shape[1]):
            cells = []
            for output in outputs.values():
                known = b < len(output.texts)
                cells += [Text(output.texts[b][k]), signed(output.rewards[b, k].item())] if known else ["", "-"]
            table.add_row(*cells)
        yield table


def title(prompt: Prompt) -> str:
    """A prompt as it was given: a text quoted, of a chat one line for every message."""
    if isinstance(prompt, str):
        return repr(prompt)
    return "\n".join(f"{message['role']}: {message['content']!r}" for message in prompt)


def signed(value: float) -> str:
    """Two decimals and the sign; ``-`` for what does not exist (an interrupted run's rewards)."""
    return "-" if math.isnan(value) else f"{value:+.2f}"


def as_dict(prompts: Sequence[Prompt], config: SamplerConfig, output: Output) -> dict:
    """A generation as plain data; rewards may be NaN, which JSON does not know: see :func:`finite`."""
    made = len(output.texts)
    return {
        "version": metadata.version("entrgi"),
        "complete": output.complete,
        "config": plain_options(config),
        "results": [{"prompt": prompt, **result_dict(output, b)} for b, prompt in enumerate(prompts[:made])],
        "history": asdict(output.history),
        "timings": output.timings,
    }


def result_dict(output: Output, b: int) -> dict[str, Any]:
    """What became of prompt number ``b``; seeds are texts, since many readers of JSON keep 53 bits of a number."""
    parts = {} if output.reward_parts is None else {"reward_parts": output.reward_parts[b].tolist()}
    return {
        "texts": output.texts[b],
        "responses": output.responses[b],
        "rewards": output.rewards[b].tolist(),
        **parts,
        "top1": output.top1[b].item(),
        "avg": output.avg[b].item(),
        "candidate_rewards": output.candidate_rewards[b].tolist(),
        "trajectory_seeds": list(map(str, output.seeds[b].tolist())),
    }


def finite(data: object, place: str = "") -> tuple[Any, dict[str, str]]:
    """Plain data with None for every NaN and infinity, and these by their place, such as ``results[0].top1``."""
    if isinstance(data, float) and not math.isfinite(data):
        return None, {place: str(data)}
    if isinstance(data, dict):
        parts = {key: finite(value, f"{place}.{key}" if place else key) for key, value in data.items()}
        replaced: object = {key: value for key, (value, _) in parts.items()}
        found = [lost for _, lost in parts.values()]
    elif isinstance(data, list | tuple):
        items = [finite(value, f"{place}[{i}]") for i, value in enumerate(data)]
        replaced, found = [value for value, _ in items], [lost for _, lost in items]
    else:
        return data, {}
    return replaced, {key: value for lost in found for key, value in lost.items()}
