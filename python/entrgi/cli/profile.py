"""``entrgi profile``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from entrgi.cli.console import console, errors, reported_errors
from entrgi.cli.models import MODELS, Models
from entrgi.cli.options import PRESET, SAMPLER, accepts, sampler_config
from entrgi.cli.prompts import PROMPTS, read_prompts
from entrgi.cli.sample import EMBEDDED_TOKENS


@accepts(PROMPTS, MODELS, SAMPLER)
def profile(
    preset: Annotated[str, typer.Option(help=PRESET)] = "paper",
    first_steps: Annotated[int | None, typer.Option(help="Only so many denoising steps: the most expensive.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs, of which the median counts, step by step.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Draw them to this file.")] = None,
    **options: object,
) -> None:
    """Show where the time of a denoising step goes, and the least that each part could take on this machine.

    That floor is the longer of bytes over copy bandwidth and FLOPs over the rate of matrix products, both measured in
    the same run.
    """
    with reported_errors():
        from entrgi import profile as profiling
        from entrgi.files import check_target, write_text
        from entrgi.profile import figure, report

        if json_file is not None:
            check_target("--json", json_file)
        if png_file is not None:
            figure.check(png_file)
        models = Models.of(options)
        config = sampler_config(preset, options, EMBEDDED_TOKENS if models.is_embedded else None)
        prompts = read_prompts(options, models.is_embedded)
        denoiser, reward = models.load()
        total = 1 + (1 + repeats) * min(first_steps or config.steps, config.steps)
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
        except KeyboardInterrupt:
            errors.print("interrupted: nothing is profiled until all runs are done", style="bold red")
            raise typer.Exit(130) from None
        console.print(report.table(result, denoiser.device))
        if json_file is not None:
            source = {**models.describe(), "seed": seed, "prompts": prompts}
            data = {**source, **report.as_dict(result, denoiser.device, config)}
            write_text(json_file, json.dumps(data, indent=1, allow_nan=False) + "\n")
        if png_file is not None:
            figure.write(png_file, result, denoiser.device)


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
