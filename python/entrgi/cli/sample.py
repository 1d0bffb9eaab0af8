"""``entrgi sample``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrgi import memory
from entrgi.cli.batches import Batch, Work
from entrgi.cli.console import code_of, console, end_with, errors, print_error, reported_errors, silence, write_json
from entrgi.cli.models import MODELS, Models
from entrgi.cli.options import JSON_FILE, PRESET, SAMPLER, Option, accepts, sampler_config
from entrgi.cli.prompts import PROMPTS, read_prompts
from entrgi.cli.results import Results, Settings
from entrgi.cli.seeds import Seeds
from entrgi.cli.targets import Files

if TYPE_CHECKING:
    from entrgi.config import SamplerConfig
    from entrgi.outputs import Output
    from entrgi.prompts import Prompt
    from entrgi.trace import Trace


@accepts(PROMPTS, MODELS, SAMPLER)
def sample(
    preset: Annotated[str, PRESET] = "paper",
    compare: Annotated[bool, Option(help="Unguided beside guided, same seeds.")] = False,
    seed: Annotated[int | None, Option(help="Same seed, same device: same texts, bit for bit.")] = None,
    trajectory_seeds: Annotated[
        list[str] | None,
        Option(help="One seed for each text, prompt by prompt, with commas or repeated: those that --json reports."),
    ] = None,
    json: Annotated[Path | None, JSON_FILE] = None,
    output: Annotated[
        Path | None, Option(help="Add every finished prompt to this file, a line of JSON each.", short="-o")
    ] = None,
    resume: Annotated[bool, Option(help="Go on with --output: the prompts that it holds are left out.")] = False,
    trace: Annotated[Path | None, Option(help="Write every step to this file, for `entrgi view`.")] = None,
    plot: Annotated[Path | None, Option(help="Draw reward and entropy curves to this .png, .pdf or .svg.")] = None,
    **options: Any,
) -> None:
    """Write texts with a masked diffusion LM, steered by a reward model.

    Exit code 2 for input that cannot be used, 1 for failures; what is done is kept and shown then, and after Ctrl-C
    (130) or SIGTERM (143).
    """
    with reported_errors():
        models = Models.of(options)
        config = sampler_config(preset, options, models.is_embedded)
        runs = configs(config, compare)
        check_judged(models, runs)
        for each in runs.values():
            memory.check(each, 1)
        files = Files(json, trace, plot, output, resume)
        files.check(options)
        prompts = read_prompts(options, models.is_embedded)
        seeds = Seeds.of(seed, trajectory_seeds, len(prompts), config.num_trajectories)
        run_sample(prompts, runs, models, seeds, files)


def configs(config: SamplerConfig, compare: bool) -> dict[str, SamplerConfig]:
    """The runs by name: the one asked for, to compare with an unguided one before it."""
    if not compare:
        return {config.guidance: config}
    if config.guidance == "none":
        raise ValueError("--compare: expected a --guidance to compare with none")
    # Unguided in everything but the guidance: the same confidence rule, the same draws.
    unguided = replace(config, guidance="none", entropy_rule=config.entropy_source, gumbel_temperature=1.0)
    return {"unguided": unguided, config.guidance: config}


def check_judged(models: Models, runs: dict[str, SamplerConfig]) -> None:
    """Raise ValueError where there is no reward and one is needed."""
    for config in () if models.rewards else runs.values():
        if config.guidance != "none" or config.best_of is not None:
            raise ValueError("--reward: none goes with --guidance none and without --best-of, which ask for one")


@dataclass
class Done:
    """What has been generated so far, and what ended it early."""

    outputs: dict[str, list[Output]] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    error: BaseException | None = None

    def add(self, batch: Batch) -> None:
        for name, output in batch.outputs.items():
            self.outputs.setdefault(name, []).append(replace(output, steps=None))
        self.error = batch.error


def run_sample(
    prompts: list[Prompt], runs: dict[str, SamplerConfig], models: Models, seeds: Seeds, files: Files
) -> None:
    """Generate, write files, and print; an error or an interrupt keeps what is done, and its exit code."""
    from entrgi.cli import display

    results = None if files.output is None else Results(files.output, files.resume)
    if seeds.base is None and seeds.given is None:
        known = results.seed if results is not None else None
        seeds = Seeds(random.getrandbits(31) if known is None else known, None)
    shared = settings_of(models, runs)
    settings = [{**shared, **seeds.describe(index)} for index in range(len(prompts))]
    finished = results.done(prompts, settings) if results is not None else set()
    if finished:
        errors.print(f"{len(finished)} of {len(prompts)} prompts are in {files.output}", style="dim", markup=False)
    left = [index for index in range(len(prompts)) if index not in finished]
    if not left:
        write_json(files.json, {**models.describe(), **seeds.describe(), "runs": {}, "not_finite": {}})
        return

    denoiser, reward = models.load()
    made = seeds.tensor(len(prompts), next(iter(runs.values())).num_trajectories)
    work = Work([prompts[i] for i in left], left, runs, denoiser, reward, made[left], files.of_steps)
    source = {**models.describe(), **seeds.describe(), "device": str(denoiser.device)}
    shows_progress = not files.json_is_shown or errors.is_terminal
    with display.progress(errors, enabled=shows_progress) as track:
        done = generate(work, work.batches(track), source, results, settings)
    report(done, work, source, files)


def settings_of(models: Models, runs: dict[str, SamplerConfig]) -> Settings:
    """All that texts follow from, besides prompts and seeds."""
    from entrgi.trace import plain_options

    return {**models.settings(), "runs": {name: plain_options(config) for name, config in runs.items()}}


def generate(
    work: Work, batches: Iterator[Batch], source: dict[str, Any], results: Results | None, settings: list[Settings]
) -> Done:
    """All batches, until an error or an interrupt, which is kept; finished prompts are on the disk before the next.

    Args:
        source: where a trace says that it comes from.
        results: the file of finished prompts, if there is one.
        settings: of all prompts, those not among ``work``'s, too.
    """
    from entrgi import trace as traces

    done = Done()
    try:
        for batch in batches:
            done.add(batch)
            if results is not None and batch.error is None:
                results.add(lines_of(batch, work, settings))
            if work.keep_steps and batch.outputs:
                runs = {name: (work.runs[name], output) for name, output in batch.outputs.items()}
                done.traces.append(traces.record(work.prompts[batch.start : batch.stop], runs, work.denoiser, source))
    except BaseException as error:
        done.error = error
    begun = any(output.history.step for parts in done.outputs.values() for output in parts)
    if done.error is not None and not begun:
        raise done.error
    return done


def lines_of(batch: Batch, work: Work, settings: list[Settings]) -> list[dict[str, Any]]:
    """Its prompts as the file of finished prompts has them."""
    from entrgi.cli import display

    lines = []
    for place in range(batch.start, batch.stop):
        runs = {name: display.result_dict(output, place - batch.start) for name, output in batch.outputs.items()}
        data, lost = display.finite({"runs": runs})
        index, prompt = work.places[place], work.prompts[place]
        lines.append({"index": index, "prompt": prompt, **data, "settings": settings[index], "not_finite": lost})
    return lines


def report(done: Done, work: Work, source: dict[str, Any], files: Files) -> None:
    """Files first, then the texts, then what went wrong: a terminal that cannot show them costs nothing."""
    from entrgi.outputs import concatenate

    runs = {
        name: (work.runs[name], concatenate(parts, work.denoiser.pad_token_id)) for name, parts in done.outputs.items()
    }
    begun = max(len(output.texts) for _, output in runs.values())
    prompts = work.prompts[:begun]
    data = as_json(prompts, runs, source) if files.json is not None else {}
    failed = list(write_files(done, data, files))
    try:
        show(prompts, runs, source, data, files)
    except BrokenPipeError:
        if done.error is None and not failed:
            raise
        silence(sys.stdout)  # what went wrong is still to be told
    for error in failed:
        print_error(error)
    if done.error is None:
        if failed:
            raise typer.Exit(code_of(failed[0]) or 1)
        return
    unfinished = "what is shown is unfinished"
    end_with(done.error, f"interrupted: {unfinished}", unfinished)


def write_files(done: Done, data: dict[str, Any], files: Files) -> Iterator[Exception]:
    """Every file as a whole; an error that kept one from being written is no reason to leave out the others."""
    from entrgi import trace as traces
    from entrgi.trace import plot

    trace = traces.concatenate(done.traces) if done.traces else None
    kinds: list[tuple[str, Path | None, Callable[[Path, Any], object], object]] = [
        ("trace", files.trace, traces.write, trace),
        ("plot", files.plot, plot.write, trace),
        ("json", None if files.json_is_shown else files.json, write_json, data),
    ]
    for name, path, write, content in kinds:
        if path is None or content is None:
            continue
        try:
            write(path, content)
        except (ValueError, OSError, RuntimeError) as error:
            yield error
        else:
            errors.print(f"{name}: {path}", style="dim", markup=False, highlight=False, soft_wrap=True)


def as_json(
    prompts: list[Prompt], runs: dict[str, tuple[SamplerConfig, Output]], source: dict[str, Any]
) -> dict[str, Any]:
    """One object. NaN and infinities are null in it, and ``not_finite`` names their places."""
    from entrgi.cli import display

    described = {name: display.as_dict(prompts, config, output) for name, (config, output) in runs.items()}
    data, lost = display.finite({**source, "runs": described})
    return {**data, "not_finite": lost}


def show(
    prompts: list[Prompt],
    runs: dict[str, tuple[SamplerConfig, Output]],
    source: dict[str, Any],
    data: dict[str, Any],
    files: Files,
) -> None:
    """The JSON object where it is for standard output, otherwise the texts."""
    from entrgi.cli import display

    if files.json_is_shown:
        write_json(files.json, data)
        return
    for renderable in display.report(prompts, {name: output for name, (_, output) in runs.items()}):
        console.print(renderable)
    seed = "trajectory seeds as given" if source["seed"] is None else f"seed {source['seed']}"
    console.print(f"{seed}, {source['device']}", style="dim")
