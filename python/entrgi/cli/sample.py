"""``entrgi sample``."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrgi.cli.console import console, errors, reported_errors
from entrgi.cli.models import MODELS, Models
from entrgi.cli.options import PRESET, SAMPLER, accepts, sampler_config
from entrgi.cli.prompts import PROMPTS, read_prompts

if TYPE_CHECKING:
    from entrgi.config import SamplerConfig
    from entrgi.denoisers import Denoiser
    from entrgi.outputs import Output
    from entrgi.prompts import Prompt

EMBEDDED_TOKENS = 16


@accepts(PROMPTS, MODELS, SAMPLER)
def sample(
    preset: Annotated[str, typer.Option(help=PRESET)] = "paper",
    compare: Annotated[bool, typer.Option("--compare", help="Unguided beside guided, same seeds.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same device: same texts, bit for bit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write every step to this file, for `entrgi view`.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw reward and entropy curves to this .png, .pdf or .svg.")
    ] = None,
    **options: object,
) -> None:
    """Write texts with a masked diffusion LM, steered by a reward model."""
    with reported_errors():
        models = Models.of(options)
        config = sampler_config(preset, options, EMBEDDED_TOKENS if models.is_embedded else None)
        run_sample(
            read_prompts(options, models.is_embedded),
            configs(config, compare),
            models,
            seed=random.getrandbits(31) if seed is None else seed,
            files=Files(trace, plot),
            as_json=as_json,
        )


def configs(config: SamplerConfig, compare: bool) -> dict[str, SamplerConfig]:
    """The runs by name: the one asked for, to compare with an unguided one before it."""
    if not compare:
        return {config.guidance: config}
    if config.guidance == "none":
        raise ValueError("--compare: expected a --guidance to compare with none")
    # Unguided in everything but the guidance: the same confidence rule, the same draws.
    unguided = replace(config, guidance="none", entropy_rule=config.entropy_source, gumbel_temperature=1.0)
    return {"unguided": unguided, config.guidance: config}


@dataclass(frozen=True)
class Files:
    """What is to be written besides the texts."""

    trace: Path | None
    plot: Path | None

    def __bool__(self) -> bool:
        return self.trace is not None or self.plot is not None

    def check(self) -> None:
        """Raise, before anything is generated, where a file cannot be written."""
        from entrgi import plot
        from entrgi.files import check_target

        for option, path in (("--trace", self.trace), ("--plot", self.plot)):
            if path is not None:
                check_target(option, path)
        if self.plot is not None:
            plot.check(self.plot)

    def write(
        self,
        prompts: list[Prompt],
        runs: dict[str, tuple[SamplerConfig, Output]],
        denoiser: Denoiser,
        source: dict[str, object],
    ) -> None:
        """Each file as a whole."""
        from entrgi import plot
        from entrgi import trace as traces

        trace = traces.record(prompts, runs, denoiser, source)
        if self.trace is not None:
            traces.write(self.trace, trace)
            errors.print(f"trace: {self.trace}", style="dim", markup=False, highlight=False, soft_wrap=True)
        if self.plot is not None:
            plot.write(self.plot, trace)
            errors.print(f"plot: {self.plot}", style="dim", markup=False, highlight=False, soft_wrap=True)


def run_sample(
    prompts: list[Prompt],
    runs: dict[str, SamplerConfig],
    models: Models,
    *,
    seed: int,
    files: Files,
    as_json: bool,
) -> None:
    """Generate, print, and write files; on Ctrl-C all of it with what is done, and exit code 130."""
    from entrgi import display, generate

    files.check()
    denoiser, reward = models.load()
    outputs, interrupted = {}, False
    with display.progress(errors, enabled=not as_json) as track:
        try:
            for name, config in runs.items():
                on_step = track(name, config.steps)
                outputs[name] = generate(
                    prompts,
                    denoiser,
                    reward,
                    config,
                    seed=seed,
                    callback_on_step_end=on_step,
                    output_history=bool(files),
                )
        except KeyboardInterrupt as interrupt:
            interrupted = True
            if hasattr(interrupt, "partial"):
                outputs[name] = interrupt.partial

    if not outputs:
        raise KeyboardInterrupt
    source = {**models.describe(), "seed": seed, "device": str(denoiser.device)}
    done = {name: (runs[name], output) for name, output in outputs.items()}
    if as_json:
        print_json(prompts, done, source)
    else:
        for renderable in display.report(prompts, outputs):
            console.print(renderable)
        console.print(f"seed {seed}, {denoiser.device}", style="dim")
    if files:
        files.write(prompts, done, denoiser, source)
    if interrupted:
        errors.print("interrupted: what is shown is unfinished", style="bold red")
        raise typer.Exit(130)


def print_json(prompts: list[Prompt], runs: dict[str, tuple[SamplerConfig, Output]], source: dict[str, object]) -> None:
    """One object. NaN and infinities are null in it, and ``not_finite`` names their places."""
    from entrgi import display

    described = {name: display.as_dict(prompts, config, output) for name, (config, output) in runs.items()}
    data, lost = display.finite({**source, "runs": described})
    print(json.dumps({**data, "not_finite": lost}, allow_nan=False))
