"""Options that several commands share, as tables: their names, types, help, and how they become a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from entrgi.config import SamplerConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")


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
        presets: of an option of the sampler, its value in the presets, in their order: the last one goes on. For the
            help alone; empty: the help says it.
        negatable: there is ``--no-name``, too.
    """

    name: str
    kind: object
    help: str
    short: str | None = None
    default: object = None
    panel: str | None = None
    presets: tuple[object, ...] = ()
    negatable: bool = False

    def parameter(self) -> inspect.Parameter:
        """As typer reads it from a signature."""
        flag = f"--{self.name.replace('_', '-')}"
        flags = [f"{flag}/--no-{flag[2:]}" if self.negatable else flag]
        flags += [self.short] if self.short else []
        option = typer.Option(
            *flags, help=self.help + self._presets(), rich_help_panel=self.panel, show_default=self.default is not None
        )
        kind = self.kind if self.default is not None else self.kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, option]
        )

    def _presets(self) -> str:
        if not self.presets:
            return ""
        other = f", {_PRESETS[1]}: {self.presets[1]}" if len(self.presets) > 1 else ""
        return f" \\[default: {self.presets[0]}{other}]"


PRESET = "paper or rgrl; options given beside it replace its values."
_PRESETS = ("paper", "rgrl")
WRITING, RANKING = "Denoising", "Drawing and ranking"
GUIDANCE, MACHINE = "Guidance", "Memory and speed, same result"

# One for each field of SamplerConfig; kept here so that help needs no torch.
SAMPLER = (
    Option("num_return_sequences", int, "Texts per prompt.", "-k", panel=WRITING, presets=(4,)),
    Option("best_of", int, "Make so many per prompt, return those with the highest rewards.", panel=WRITING),
    Option("max_new_tokens", int, "Response length; 16 for the embedded pair.", "-l", panel=WRITING, presets=(128,)),
    Option("steps", int, "Denoising steps; one for each new token where it is not given.", "-t", panel=WRITING),
    Option(
        "schedule",
        str,
        "How many tokens a step commits: paper, rgrl or uniform.",
        panel=WRITING,
        presets=("paper", "rgrl"),
    ),
    Option("block_length", int, "Fill from left to right in blocks of so many tokens.", panel=WRITING),
    Option("threshold", float, "Commit every token with at least this confidence.", panel=WRITING),
    Option("early_exit", bool, "Stop a text where its end is written and nothing before is masked.", panel=WRITING),
    Option("infill", bool, "Fill mask tokens inside the prompts, too.", panel=WRITING),
    Option("temperature", float, "Of draws and relaxed embeddings.", panel=RANKING, presets=(0.7, 0.9)),
    Option("top_p", float, "Nucleus of the draws; 1 is off.", panel=RANKING, presets=(0.95,)),
    Option("top_k", int, "Largest logits that may be drawn.", panel=RANKING, presets=("off", 50)),
    Option(
        "alg",
        str,
        "Confidence: entropy, maskgit_plus, topk_margin, anchor, or origin (at random).",
        panel=RANKING,
        presets=("entropy",),
    ),
    Option("alg_temp", float, "> 0 draws positions instead of taking the best.", panel=RANKING, presets=(0.0,)),
    Option(
        "entropy_rule",
        str,
        "Distribution of the entropy confidence: auto, initial or filtered.",
        panel=RANKING,
        presets=("auto", "filtered"),
    ),
    Option(
        "deprioritize_eos",
        bool,
        "Rank a drawn end of sequence last.",
        panel=RANKING,
        presets=("yes", "no"),
        negatable=True,
    ),
    Option(
        "guidance", str, "entrgi, aps, expectation, gumbel, or none (unguided).", panel=GUIDANCE, presets=("entrgi",)
    ),
    Option("guidance_steps", int, "Optimiser steps per denoising step.", "-m", panel=GUIDANCE, presets=(3, 1)),
    Option("guidance_lr", float, "Learning rate, in logits.", panel=GUIDANCE, presets=(0.5,)),
    Option(
        "guidance_interval",
        str,
        "Guide every so many steps (4), or in a window (8:96, end excluded).",
        panel=GUIDANCE,
        presets=(1,),
    ),
    Option("optimizer", str, "adam or sgd.", panel=GUIDANCE, presets=("adam",)),
    Option("gumbel_temperature", float, "Of --guidance gumbel.", panel=GUIDANCE, presets=(1.0,)),
    Option("reward_scale", float, "Factor on the reward; -1 steers the other way.", panel=GUIDANCE, presets=(1.0,)),
    Option("logits_dtype", str, f"In which logits are optimised: {', '.join(DTYPES)}.", panel=GUIDANCE),
    Option("max_rows", int, "At most so many rows of logits at once.", panel=MACHINE),
    Option("row_bucket", int, "Round the number of rows up to a multiple.", panel=MACHINE),
    Option("cuda_graphs", bool, "Capture the guidance loop as CUDA graphs.", panel=MACHINE),
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


def sampler_config(preset: str, options: dict[str, object], embedded: int | None = None) -> SamplerConfig:
    """The preset with the options that were given (those that are not None).

    Args:
        preset: its name.
        options: values of :data:`SAMPLER`'s options, by name; others are passed over.
        embedded: the embedded pair's response length, where none is given; None: the preset's.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    from entrgi.config import preset as make

    names = {option.name for option in SAMPLER}
    given = {name: value for name, value in options.items() if name in names and value is not None}
    if embedded is not None:
        given.setdefault("max_new_tokens", embedded)
    if "guidance_interval" in given:
        given["guidance_interval"] = interval(given["guidance_interval"])
    if "logits_dtype" in given:
        given["logits_dtype"] = dtype("--logits-dtype", given["logits_dtype"])
    length = given.get("max_new_tokens") or embedded  # 0 only fills what a prompt leaves open
    if length is not None:
        given.setdefault("steps", max(length, 1))
    return make(preset, **given)


def interval(text: str) -> int | tuple[int, int]:
    """``"4"`` is 4, ``"8:96"`` is (8, 96)."""
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--guidance-interval: expected a number of steps (4) or a window (8:96), got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def dtype(option: str, name: str) -> torch.dtype:
    """torch's dtype of that name."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"{option} must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)
