"""Options that several commands share, as tables: their names, types, help, and how they become a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from entrgi import memory
from entrgi.cli.commands import UsageError
from entrgi.config import CHOICES, DTYPES, PRESETS
from entrgi.config import preset as make_config

if TYPE_CHECKING:
    import torch

    from entrgi.config import SamplerConfig

LARGEST_VOCABULARY = 2**24
EMBEDDED_TOKENS = 16


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: of the parameter; the option is ``--name`` with dashes.
        kind: int, float, str, bool (a switch), Path, or a list of these for an option that may be repeated.
        help: one line.
        short: such as ``-k``.
        default: where it is not given.
        panel: heading in the help.
        choices: the values that a text may have.
        of_sampler: the help shows the presets' values.
        negatable: there is ``--no-name``, too.
    """

    name: str
    kind: object
    help: str
    short: str | None = None
    default: object = None
    panel: str | None = None
    choices: tuple[str, ...] = ()
    of_sampler: bool = False
    negatable: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def item(self) -> object:
        """The type of one value."""
        return next(iter(get_args(self.kind)), self.kind)

    def parameter(self) -> inspect.Parameter:
        """As typer reads it from a signature."""
        flags = [f"{self.flag}/--no-{self.flag[2:]}" if self.negatable else self.flag]
        flags += [self.short] if self.short else []
        option = typer.Option(
            *flags,
            help=self.help + choices_help(self.choices) + (presets_help(self.name) if self.of_sampler else ""),
            rich_help_panel=self.panel,
            show_default=self.default is not None,
            **({} if self.kind is bool else checked(self.flag, self.item, self.choices)),
        )
        kind = self.kind if self.default is not None else self.kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, option]
        )


def checked(
    flag: str, kind: object = str, choices: tuple[str, ...] = (), least: int | None = None, most: int | None = None
) -> dict[str, object]:
    """Settings of a typer option: how its text becomes a value of ``kind``, or an error with the option and the text.

    All of it is known before anything is imported, and the choices are completed by the shell.
    """
    name, convert = _KINDS[kind]
    expected = name if least is None else f"{name} >= {least}"
    expected += "" if most is None else f" and <= {most}"

    def parse(text: str) -> object:
        if not isinstance(text, str):  # a default
            return text
        if "\0" in text or (kind is not Path and any("\ud800" <= char <= "\udfff" for char in text)):
            raise UsageError(f"{flag}: expected UTF-8 text without NUL, got {text!r:.80}")
        if choices and text not in choices:
            raise UsageError(f"{flag} must be one of {', '.join(choices)}, got {text!r:.80}")
        try:
            value = convert(text)
        except ValueError:
            raise UsageError(f"{flag}: expected {expected}, got {text!r:.80}") from None
        if (least is not None and value < least) or (most is not None and value > most):
            raise UsageError(f"{flag}: expected {expected}, got {text!r:.80}")
        return value

    settings: dict[str, object] = {"parser": parse, "metavar": "CHOICE" if choices else name.split()[-1].upper()}
    if choices:
        settings["autocompletion"] = lambda incomplete: [each for each in choices if each.startswith(incomplete)]
    return settings


_KINDS: dict[object, tuple[str, Callable[[str], object]]] = {
    str: ("text", str),
    int: ("an integer", int),
    float: ("a number", float),
    Path: ("a file", Path),
}


def choices_help(choices: tuple[str, ...]) -> str:
    """The choices as the end of a line of help."""
    return f" One of {', '.join(choices)}." if choices else ""


def presets_help(name: str) -> str:
    """The values of a sampler's option in the presets, such as ``[default: 0.7, rgrl: 0.9]``; nothing for "off"."""
    first, *others = [(each, getattr(make_config(each), name)) for each in PRESETS]
    different = [f"{each}: {_spoken(value)}" for each, value in others if value != first[1]]
    if not different and (first[1] is None or first[1] is False):
        return ""
    return f" \\[default: {', '.join([_spoken(first[1]), *different])}]"


def _spoken(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else str(value)


PRESET = typer.Option(
    help="Options given beside it replace its values." + choices_help(tuple(PRESETS)),
    **checked("--preset", choices=tuple(PRESETS)),
)
JSON_FILE = typer.Option(
    "--json",
    help="One JSON object, to this file or to standard output.",
    **{**checked("--json", Path), "metavar": "[FILE]"},
)
WRITING, RANKING = "Denoising", "Drawing and ranking"
GUIDANCE, MACHINE = "Guidance", "Memory and speed, same result"

_WRITING = (
    Option("num_return_sequences", int, "Texts per prompt.", "-k"),
    Option("best_of", int, "Make so many per prompt, return those with the highest rewards."),
    Option("max_new_tokens", int, f"Response length; {EMBEDDED_TOKENS} for the embedded pair.", "-l"),
    Option(
        "steps", int, f"Denoising steps; {EMBEDDED_TOKENS} for the embedded pair where its length is not given.", "-t"
    ),
    Option("schedule", str, "How many tokens a step commits."),
    Option("block_length", int, "Fill from left to right in blocks of so many tokens."),
    Option("threshold", float, "Commit every token with at least this confidence."),
    Option("early_exit", bool, "Stop a text where its end is written and nothing before is masked."),
    Option("infill", bool, "Fill mask tokens inside the prompts, or read them as text.", negatable=True),
)
_RANKING = (
    Option("temperature", float, "Of draws and relaxed embeddings; 0 is greedy."),
    Option("top_p", float, "Nucleus of the draws; 1 is off."),
    Option("top_k", int, "Largest logits that may be drawn; 0 is off."),
    Option("alg", str, "Confidence that ranks positions; random, origin: at random."),
    Option("alg_temp", float, "> 0 draws positions instead of taking the best."),
    Option("entropy_rule", str, "Distribution of the entropy confidence."),
    Option("deprioritize_eos", bool, "Rank a drawn end of sequence last.", negatable=True),
    Option("end_tokens", str, "Which ends rank last and hide what follows from guidance."),
)
_GUIDANCE = (
    Option("guidance", str, "Estimator of the reward's gradient; none: unguided."),
    Option("guidance_steps", int, "Optimiser steps per denoising step.", "-m"),
    Option("guidance_lr", float, "Learning rate, in logits."),
    Option("guidance_interval", str, "Guide every so many steps (4), or in a window (8:96, end excluded)."),
    Option("optimizer", str, "Of the logits."),
    Option("gumbel_temperature", float, "Of --guidance gumbel."),
    Option("reward_scale", float, "Factor on the reward; -1 steers the other way."),
    Option("logits_dtype", str, "In which logits are optimised.", choices=DTYPES),
)
_MACHINE = (
    Option("max_rows", int, "At most so many rows of logits at once."),
    Option("row_bucket", int, "Round the number of rows up to a multiple."),
    Option("cuda_graphs", bool, "Capture the guidance loop as CUDA graphs."),
)
# One for each field of SamplerConfig.
SAMPLER = tuple(
    replace(option, panel=panel, of_sampler=True, choices=option.choices or CHOICES.get(option.name, ()))
    for panel, options in ((WRITING, _WRITING), (RANKING, _RANKING), (GUIDANCE, _GUIDANCE), (MACHINE, _MACHINE))
    for option in options
)


def accepts(*tables: tuple[Option, ...]) -> Callable[[Callable], Callable]:
    """Decorator: a command with ``**options`` takes the options of ``tables``, and gets all of them by name."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [option.parameter() for table in tables for option in table]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        function.__signature__ = signature.replace(parameters=[*keyword, *added])
        return function

    return decorate


def sampler_config(preset: str, options: dict[str, object], embedded: bool = False) -> SamplerConfig:
    """The preset with the options that were given (those that are not None), as in :func:`entrgi.config.preset`.

    Args:
        preset: its name.
        options: values of :data:`SAMPLER`'s options, by name; others are passed over.
        embedded: whether the denoiser is the embedded pair's, which writes 16 tokens in 16 steps where no length is
            given.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    names = {option.name for option in SAMPLER}
    given = {name: value for name, value in options.items() if name in names and value is not None}
    if embedded and "max_new_tokens" not in given:
        given["max_new_tokens"] = EMBEDDED_TOKENS
        given.setdefault("steps", EMBEDDED_TOKENS)
    if "guidance_interval" in given:
        given["guidance_interval"] = interval(given["guidance_interval"])
    top_k = given.get("top_k", 0)
    if top_k > LARGEST_VOCABULARY:
        raise ValueError(
            f"--top-k must be <= {LARGEST_VOCABULARY}, got {top_k}: a row of so many logits would need at least "
            f"{memory.size(2 * top_k)}"
        )
    dtype_name = given.pop("logits_dtype", None)
    config = make_config(preset, **given)  # everything else is checked before torch is imported
    return config if dtype_name is None else replace(config, logits_dtype=dtype(dtype_name))


def interval(text: str) -> int | tuple[int, int]:
    """``"4"`` is 4, ``"8:96"`` is (8, 96)."""
    try:
        numbers = [int(part) for part in text.split(":")] if len(text) < 64 else []
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--guidance-interval: expected a number of steps (4) or a window (8:96), got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    import torch

    return getattr(torch, name)
