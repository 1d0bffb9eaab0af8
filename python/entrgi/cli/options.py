"""Options of commands: their names, types and help, those of the sampler among them, and how they become a config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from entrgi import memory
from entrgi.cli.commands import UsageError
from entrgi.config import PRESETS, SamplerConfig
from entrgi.config import preset as make_config

LARGEST_VOCABULARY = 2**24
EMBEDDED_TOKENS = 16


@dataclass(frozen=True)
class Option:
    """One option of a command, in a table or as the annotation of a parameter, which then gives name, kind and default.

    Attributes:
        name: of the parameter; the option is ``--name`` with dashes.
        kind: int, float, str, bool (a switch), Path, or a list of these for an option that may be repeated.
        help: one line.
        short: another name, such as ``-k``.
        default: where it is not given.
        panel: heading in the help.
        choices: the values that a text may have.
        least, most: the range of a number.
        presets: the values in the presets, as the end of the help.
        negatable: there is ``--no-name``, too.
        metavar: how the help shows a value, where that does not follow from its kind.
        complete: what a shell is to offer, where that are no choices.
    """

    name: str = ""
    kind: Any = None
    help: str = ""
    short: str | None = None
    default: object = None
    panel: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    presets: str = ""
    negatable: bool = False
    metavar: str | None = None
    complete: Callable[[str], list[str]] | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def item(self) -> Any:
        """The type of one value."""
        return next(iter(get_args(self.kind)), self.kind)

    def parameter(self) -> inspect.Parameter:
        """As typer reads it from a signature."""
        flags = [f"{self.flag}/--no-{self.flag[2:]}" if self.negatable else self.flag]
        flags += [self.short] if self.short else []
        choices = f" One of {', '.join(self.choices)}." if self.choices else ""
        settings = {} if self.kind is bool else checked(self.flag, self.item, self.choices, self.least, self.most)
        settings |= {"metavar": self.metavar} if self.metavar else {}
        settings |= {"autocompletion": self.complete} if self.complete else {}
        option = typer.Option(
            *flags,
            help=self.help.replace("[", "\\[") + choices + self.presets,
            rich_help_panel=self.panel,
            show_default=self.default is not None,
            **settings,
        )
        kind = self.kind if self.default is not None else self.kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[kind, option]
        )


def checked(
    flag: str, kind: object = str, choices: tuple[str, ...] = (), least: int | None = None, most: int | None = None
) -> dict[str, Any]:
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

    settings: dict[str, Any] = {"parser": parse, "metavar": "CHOICE" if choices else name.split()[-1].upper()}
    if choices:
        settings["autocompletion"] = lambda incomplete: [each for each in choices if each.startswith(incomplete)]
    return settings


_KINDS: dict[object, tuple[str, Callable[[str], Any]]] = {
    str: ("text", str),
    int: ("an integer", int),
    float: ("a number", float),
    Path: ("a file", Path),
}


def accepts(*tables: tuple[Option, ...]) -> Callable[[Callable], Callable]:
    """Decorator: a command's own options are those that annotate its parameters.

    One with ``**options`` takes those of ``tables``, too, and gets all of them by name.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [_annotated(p) for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [option.parameter() for table in tables for option in table]
        function.__signature__ = signature.replace(parameters=[*own, *added])
        return function

    return decorate


def _annotated(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter that an :class:`Option` annotates, as typer reads it."""
    kind, option = get_args(parameter.annotation)
    if not isinstance(option, Option):
        return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    return replace(option, name=parameter.name, kind=kind, default=parameter.default).parameter()


PRESET = Option(help="Options given beside it replace its values.", choices=tuple(PRESETS))
JSON_FILE = Option(help="One JSON object, to this file or to standard output.", metavar="[FILE]")

_SHORT = {"num_return_sequences": "-k", "max_new_tokens": "-l", "steps": "-t", "guidance_steps": "-m"}
# What holds on the command line alone.
_NOTES = {
    "max_new_tokens": f" {EMBEDDED_TOKENS} for the embedded pair.",
    "steps": f" {EMBEDDED_TOKENS} for the embedded pair where its length is not given.",
    "guidance_interval": " Every so many (4), or those in a window (8:96, end excluded).",
}


def _sampler_options() -> tuple[Option, ...]:
    """One for each field of SamplerConfig, whose docstring has the texts."""
    attributes = (inspect.getdoc(SamplerConfig) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return tuple(_sampler_option(each, texts.get(each.name, "")) for each in fields(SamplerConfig))


def _sampler_option(each: Field, text: str) -> Option:
    kind = each.metadata["kind"]
    first_sentence = re.sub(r"(?<=\.) .*", "", text.replace("``", ""))
    return Option(
        each.name,
        kind.kind,
        first_sentence + _NOTES.get(each.name, ""),
        _SHORT.get(each.name),
        panel=each.metadata["group"],
        choices=getattr(kind, "choices", ()),
        presets=_presets_help(each),
        negatable=kind.kind is bool and each.default is not False,
    )


def _presets_help(each: Field) -> str:
    """The values in the presets, such as ``[default: 0.7, rgrl: 0.9]``; nothing for "off"."""
    others = [f", {name}: {_spoken(values[each.name])}" for name, values in PRESETS.items() if each.name in values]
    if not others and (each.default is None or each.default is False):
        return ""
    return f" \\[default: {_spoken(each.default)}{''.join(others)}]"


def _spoken(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else str(value)


SAMPLER = _sampler_options()


def sampler_config(preset: str, options: dict[str, Any], embedded: bool = False) -> SamplerConfig:
    """The preset with the options that were given (those that are not None), as in :func:`entrgi.config.preset`.

    Args:
        preset: its name.
        options: values of :data:`SAMPLER`'s options, by name; others are passed over.
        embedded: whether the denoiser is the embedded pair's, which writes 16 tokens in 16 steps where no length is
            given.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    given = {each.name: options[each.name] for each in SAMPLER if options.get(each.name) is not None}
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
    return make_config(preset, **given)


def interval(text: str) -> int | tuple[int, int]:
    """``"4"`` is 4, ``"8:96"`` is (8, 96)."""
    try:
        numbers = [int(part) for part in text.split(":")] if len(text) < 64 else []
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--guidance-interval: expected a number of steps (4) or a window (8:96), got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
