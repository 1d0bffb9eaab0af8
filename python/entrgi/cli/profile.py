"""``entrgi profile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from entrgi import memory
from entrgi.cli.console import console, end_with, errors, reported_errors, write_json
from entrgi.cli.models import MODELS, Models
from entrgi.cli.options import JSON_FILE, PRESET, SAMPLER, Option, accepts, sampler_config
from entrgi.cli.prompts import PROMPTS, read_prompts
from entrgi.cli.targets import Files
from entrgi.config import MAX_STEPS

MAX_REPEATS = 10_000


@accepts(PROMPTS, MODELS, SAMPLER)
def profile(
    preset: Annotated[str, PRESET] = "paper",
    first_steps: Annotated[
        int | None, Option(help="Only so many denoising steps: the most expensive.", least=1, most=MAX_STEPS)
    ] = None,
    repeats: Annotated[
        int, Option(help="Runs, of which the median counts, step by step.", least=1, most=MAX_REPEATS)
    ] = 3,
    seed: Annotated[int, Option(help="Of the draws.", least=-(2**63), most=2**63 - 1)] = 0,
    json: Annotated[Path | None, JSON_FILE] = None,
    plot: Annotated[Path | None, Option(help="Draw them to this .png, .pdf or .svg.", short="--png")] = None,
    **options: Any,
) -> None:
    """Show where the time of a denoising step goes, and the least that each part could take on this machine.

    That floor is the longer of bytes over copy bandwidth and FLOPs over the rate of matrix products, both measured in
    the same run.
    """
    with reported_errors():
        models = Models.of(options)
        if not models.rewards:
            raise ValueError("--reward: expected a reward to profile, got none")
        config = sampler_config(preset, options, models.is_embedded)
        memory.check(config, 1)
        files = Files(json=json, plot=plot)
        files.check(options)
        prompts = read_prompts(options, models.is_embedded)

        from entrgi import profile as profiling
        from entrgi.profile import figure, report

        denoiser, reward = models.load()
        assert reward is not None
        steps = min(first_steps or config.steps, config.steps, config.max_new_tokens or config.steps)
        total = 1 + (1 + repeats) * steps  # steps that commit nothing are left out
        try:
            with progress(total) as on_step:
                result = profiling.profile(
                    prompts,
                    denoiser,
                    reward,
                    config,
                    seed=seed,
                    first_steps=first_steps,
                    repeats=repeats,
                    on_step=on_step,
                )
        except KeyboardInterrupt as interrupt:
            end_with(interrupt, "interrupted: nothing is profiled until all runs are done")
        if plot is not None:
            figure.write(plot, result, denoiser.device)
        if json is not None:
            source = {**models.describe(), "seed": seed, "prompts": prompts}
            write_json(json, {**source, **report.as_dict(result, denoiser.device, config)})
        if not files.json_is_shown:
            console.print(report.table(result, denoiser.device))


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar that moves between the steps only: a thread that draws would be measured, too."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=errors, transient=True, auto_refresh=False) as bars:
        bar = bars.add_task("counting", total=total)

        def on_step(activity: str) -> None:
            bars.update(bar, advance=1, description=activity)
            bars.refresh()

        yield on_step
