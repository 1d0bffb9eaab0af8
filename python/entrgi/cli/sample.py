"""``entrgi sample``."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrgi import memory
from entrgi.cli.batches import Batch, Work
from entrgi.cli.console import code_of, console, errors, exit_code, print_error, reported_errors, silence, write_json
from entrgi.cli.models import MODELS, Models
from entrgi.cli.options import JSON_FILE, PRESET, SAMPLER, accepts, checked, sampler_config
from entrgi.cli.prompts import PROMPTS, STDIN, read_prompts
from entrgi.cli.results import Results, Settings
from entrgi.files import check_distinct, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from entrgi.config import SamplerConfig
    from entrgi.outputs import Output
    from entrgi.prompts import Prompt
    from entrgi.trace import Trace

EXACT = 2**53  # integers beyond are rounded by many readers of JSON


@accepts(PROMPTS, MODELS, SAMPLER)
def sample(
    preset: Annotated[str, PRESET] = "paper",
    compare: Annotated[bool, typer.Option("--compare", help="Unguided beside guided, same seeds.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same device: same texts, bit for bit.", **checked("--seed", int))
    ] = None,
    trajectory_seeds: Annotated[
        list[str] | None,
        typer.Option(
            help="One seed for each text, prompt by prompt, with commas or repeated: those that --json reports.",
            **checked("--trajectory-seeds"),
        ),
    ] = None,
    json_file: Annotated[Path | None, JSON_FILE] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Add every finished prompt to this file, a line of JSON each.",
            **checked("--output", Path),
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --output: the prompts that it holds are left out.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write every step to this file, for `entrgi view`.", **checked("--trace", Path))
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw reward and entropy curves to this .png, .pdf or .svg.", **checked("--plot", Path)),
    ] = None,
    **options: object,
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
        files = Files(json_file, trace, plot, output, resume)
        files.check([options["prompts_file"], options["messages"]])
        prompts = read_prompts(options, models.is_embedded)
        seeds = Seeds.of(seed, trajectory_seeds, len(prompts), config.trajectories)
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


@dataclass(frozen=True)
class Seeds:
    """From which the trajectories' seeds derive, or these themselves."""

    base: int | None
    given: list[list[int]] | None

    @classmethod
    def of(cls, seed: int | None, given: Sequence[str] | None, prompts: int, copies: int) -> Seeds:
        """From the options; raises ValueError for seeds that are not of 64 bits, or of another number."""
        if seed is not None and given:
            raise ValueError("--trajectory-seeds: expected one of --seed and --trajectory-seeds, got both")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"--seed must be in [-2^63, 2^63), got {seed!r:.60}")
        if not given:
            return cls(seed, None)
        numbers = [_integer(part) for text in given for part in text.split(",")]
        if len(numbers) != prompts * copies:
            raise ValueError(
                f"--trajectory-seeds: expected {copies} for each of {prompts} prompts, {prompts * copies} in all, "
                f"got {len(numbers)}"
            )
        return cls(None, [numbers[i : i + copies] for i in range(0, len(numbers), copies)])

    def tensor(self, prompts: int, copies: int) -> Tensor:
        """int64 [prompts, copies]."""
        import torch

        from entrgi.generation import derive_seeds

        return derive_seeds(self.base, prompts, copies) if self.given is None else torch.tensor(self.given)

    def describe(self, index: int | None = None) -> dict[str, object]:
        """Plain data that JSON's readers keep; of prompt number ``index``, its own seeds where they were given."""
        if self.given is not None:
            return (
                {"seed": None}
                if index is None
                else {"seed": None, "trajectory_seeds": list(map(str, self.given[index]))}
            )
        return {"seed": self.base if abs(self.base) < EXACT else str(self.base)}


def _integer(text: str) -> int:
    digits = text.strip()
    if digits.lstrip("+-").isdecimal() and len(digits) <= 20 and -(2**63) <= int(digits) < 2**63:
        return int(digits)
    raise ValueError(f"--trajectory-seeds: expected integers of 64 bits, got {text!r:.60}")


@dataclass(frozen=True)
class Files:
    """What is to be written besides the texts."""

    json: Path | None = None
    trace: Path | None = None
    plot: Path | None = None
    output: Path | None = None
    resume: bool = False

    @property
    def of_steps(self) -> bool:
        return self.trace is not None or self.plot is not None

    @property
    def json_is_shown(self) -> bool:
        return self.json is not None and str(self.json) == STDIN

    def check(self, inputs: list[Path | None]) -> None:
        """Raise, before anything is generated, where a file cannot be written or is another option's, too."""
        from entrgi.trace import plot

        if self.resume and self.output is None:
            raise ValueError("--resume: expected the file to go on with as --output")
        written = {"--output": self.output, "--json": self.json, "--trace": self.trace, "--plot": self.plot}
        written = {option: path for option, path in written.items() if path is not None and str(path) != STDIN}
        for option, path in written.items():
            check_target(option, path)
        read = dict(zip(("--prompts-file", "--messages"), inputs, strict=True))
        for option, path in read.items():
            check_distinct({option: None if path is None or str(path) == STDIN else path, **written})
        if self.plot is not None:
            plot.check(self.plot, "--plot")


@dataclass
class Done:
    """What has been generated so far, and what ended it early."""

    prompts: list[Prompt]
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
        if files.json is not None:
            write_json(files.json, {**models.describe(), **seeds.describe(), "runs": {}, "not_finite": {}})
        return

    denoiser, reward = models.load()
    copies = next(iter(runs.values())).trajectories
    work = Work(
        [prompts[index] for index in left],
        left,
        runs,
        denoiser,
        reward,
        seeds.tensor(len(prompts), copies)[left],
        files.of_steps,
    )
    source = {**models.describe(), **seeds.describe(), "device": str(denoiser.device)}
    shows_progress = not files.json_is_shown or errors.is_terminal
    with display.progress(errors, enabled=shows_progress) as track:
        done = generate(work, work.batches(track), source, Lines(results, left, settings))
    report(done, work, source, files)


def settings_of(models: Models, runs: dict[str, SamplerConfig]) -> Settings:
    """All that texts follow from, besides prompts and seeds."""
    from entrgi.trace import plain_options

    return {**models.settings(), "runs": {name: plain_options(config) for name, config in runs.items()}}


@dataclass(frozen=True)
class Lines:
    """Where finished prompts go, if anywhere; ``places`` are theirs among all, ``settings`` those of all."""

    results: Results | None
    places: list[int]
    settings: list[Settings]

    def add(self, prompts: list[Prompt], batch: Batch) -> None:
        from entrgi.cli import display

        if self.results is None or batch.error is not None:
            return
        lines = []
        for b, prompt in enumerate(prompts):
            index = self.places[batch.start + b]
            made = {name: display.result_dict(prompt, output, b) for name, output in batch.outputs.items()}
            for result in made.values():
                del result["prompt"]
            data, lost = display.finite({"runs": made})
            settings = self.settings[index]
            lines.append({"index": index, "prompt": prompt, **data, "settings": settings, "not_finite": lost})
        self.results.add(lines)


def generate(work: Work, batches: Iterator[Batch], source: dict[str, object], lines: Lines) -> Done:
    """All batches, until an error or an interrupt, which is kept; finished prompts are on the disk before the next."""
    from entrgi import trace as traces

    done = Done(work.prompts)
    try:
        for batch in batches:
            prompts = work.prompts[batch.start : batch.stop]
            done.add(batch)
            lines.add(prompts, batch)
            if work.keep_steps and batch.outputs:
                runs = {name: (work.runs[name], output) for name, output in batch.outputs.items()}
                done.traces.append(traces.record(prompts, runs, work.denoiser, source))
    except BaseException as error:
        done.error = error
    begun = any(output.history.step for parts in done.outputs.values() for output in parts)
    if done.error is not None and not begun:
        raise done.error
    return done


def report(done: Done, work: Work, source: dict[str, object], files: Files) -> None:
    """Files first, then the texts, then what went wrong: a terminal that cannot show them costs nothing."""
    from entrgi.outputs import concatenate

    runs = {
        name: (work.runs[name], concatenate(parts, work.denoiser.pad_token_id)) for name, parts in done.outputs.items()
    }
    begun = max(len(output.texts) for _, output in runs.values())
    prompts = done.prompts[:begun]
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
            raise typer.Exit(code_of(failed[0]))
        return
    unfinished = "what is shown is unfinished"
    if isinstance(done.error, KeyboardInterrupt):
        errors.print(f"interrupted: {unfinished}", style="bold red")
        raise typer.Exit(exit_code(done.error))
    code = code_of(done.error)
    if code is None:
        raise done.error
    print_error(done.error)
    errors.print(unfinished, style="bold red")
    raise typer.Exit(code)


def write_files(done: Done, data: dict[str, object], files: Files) -> Iterator[Exception]:
    """Every file as a whole; an error that kept one from being written is no reason to leave out the others."""
    from entrgi import trace as traces
    from entrgi.trace import plot

    trace = traces.concatenate(done.traces) if done.traces else None
    for name, path, write, content in (
        ("trace", files.trace, traces.write, trace),
        ("plot", files.plot, plot.write, trace),
        ("json", None if files.json_is_shown else files.json, write_json, data),
    ):
        if path is None or content is None:
            continue
        try:
            write(path, content)
        except (ValueError, OSError, RuntimeError) as error:
            yield error
        else:
            errors.print(f"{name}: {path}", style="dim", markup=False, highlight=False, soft_wrap=True)


def as_json(
    prompts: list[Prompt], runs: dict[str, tuple[SamplerConfig, Output]], source: dict[str, object]
) -> dict[str, object]:
    """One object. NaN and infinities are null in it, and ``not_finite`` names their places."""
    from entrgi.cli import display

    described = {name: display.as_dict(prompts, config, output) for name, (config, output) in runs.items()}
    data, lost = display.finite({**source, "runs": described})
    return {**data, "not_finite": lost}


def show(
    prompts: list[Prompt],
    runs: dict[str, tuple[SamplerConfig, Output]],
    source: dict[str, object],
    data: dict[str, object],
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
