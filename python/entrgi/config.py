"""What a generation is asked to do: one frozen dataclass, checked when it is made.

An option is added here and where it is used: :class:`SamplerConfig` has its text and its field with what it must be,
:class:`SamplerOptions` its type for editors. Presets, aliases and the command line follow from the fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict, cast

from entrgi.deprecation import warn_renamed

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

ESTIMATORS = ("entrgi", "aps", "expectation", "gumbel")
GUIDANCE = (*ESTIMATORS, "none")
OPTIMIZERS = ("adam", "sgd")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_STEPS = 2**24  # the schedules' clock is fp32, which tells no more apart
GRAPH_ROW_BUCKET = 64
# Under which an option stands in the help.
WRITING, RANKING = "Denoising", "Drawing and ranking"
STEERING, MACHINE = "Guidance", "Memory and speed, same result"


# What an option may be. ``kind`` is the type that a command line reads; ``read`` makes of a value (numpy's scalars
# among them) the plain one that a config holds, or raises ValueError with the option's name.


@dataclass(frozen=True)
class Whole:
    """An integer of 64 bits. ``off`` is another way to write None."""

    least: int = 1
    most: int = 2**63 - 1
    off: int | None = None
    kind = int

    def read(self, name: str, value: Any) -> int | None:
        is_integer = _is_integer(value)
        if is_integer and value == self.off:
            return None
        if not is_integer or value < self.least:
            raise _error(name, value, f"must be an integer >= {self.least}")
        if value >= 2**63:
            raise _error(name, value, "must be an integer of 64 bits")
        if value > self.most:
            raise _error(name, value, f"must be <= {self.most}")
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number for which ``holds``."""

    expected: str
    holds: Callable[[Any], bool] = lambda _: True
    kind = float

    def read(self, name: str, value: Any) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not self.holds(value):
            raise _error(name, value, self.expected)
        return float(value)


@dataclass(frozen=True)
class Choice:
    """One of several names."""

    choices: tuple[str, ...]
    kind = str

    def read(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise _error(name, value, f"must be one of {', '.join(self.choices)}")
        return value


class Switch:
    """True or False."""

    kind = bool

    def read(self, name: str, value: object) -> bool:
        if not isinstance(value, bool) and str(getattr(value, "dtype", None)) != "bool":
            raise _error(name, value, "must be True or False")
        return bool(value)


class Dtype:
    """A floating dtype of torch, or its name, for which alone torch is imported."""

    choices = DTYPES
    kind = str

    def read(self, name: str, value: Any) -> torch.dtype:
        is_dtype = type(value).__module__ == "torch"
        if not (is_dtype or isinstance(value, str)) or str(value).removeprefix("torch.") not in DTYPES:
            raise _error(name, value, "must be None or a floating torch dtype")
        if is_dtype:
            return cast("torch.dtype", value)
        import torch

        return getattr(torch, value.removeprefix("torch."))


class Interval:
    """Every so many steps, or those in a window (first, end)."""

    kind = str

    def read(self, name: str, value: object) -> int | tuple[int, int]:
        if not isinstance(value, tuple | list):
            return cast(int, Whole().read(name, value))
        if len(value) != 2 or not all(map(_is_integer, value)) or not 0 <= value[0] < value[1]:
            raise _error(name, value, "must be an integer >= 1 or a window (first, end) with 0 <= first < end")
        if value[1] >= 2**63:
            raise _error(name, value, "must be integers of 64 bits")
        return int(value[0]), int(value[1])


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def option(
    default: object,
    kind: object,
    group: str,
    *,
    none: object = None,
    presets: Mapping[str, Any] | None = None,
    aliases: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The field of one option.

    Args:
        default: its value in the ``paper`` preset. Where it is None, None may be given.
        kind: what other values must be.
        group: under which it stands in the help.
        none: what None stands for where that is not the default.
        presets: its values in other presets, by their names.
        aliases: its names in other samplers, each with the values that have another name there, too.
    """
    metadata = {"kind": kind, "group": group, "none": none}
    return field(default=default, metadata={**metadata, "presets": presets or {}, "aliases": aliases or {}})


@dataclass(frozen=True)
class SamplerConfig:
    """Options of :func:`entrgi.generate`; the defaults are the ``paper`` preset (arXiv 2602.05000).

    The first sentence of each text below is the option's help on the command line.

    Attributes:
        num_return_sequences: Texts returned per prompt, K.
        best_of: Make so many per prompt, N >= K, and return the K with the highest final rewards, best first. None
            makes and returns K.
        max_new_tokens: Response length in tokens, L. Every position of it starts masked; 0 only to infill.
        steps: Denoising steps, T. Steps in which the schedule commits nothing cost nothing.
        schedule: How many positions a step commits. ``paper`` is Dream's (linear in time), ``rgrl`` rounds it, and
            ``uniform`` is LLaDA's (the same number in every step).
        block_length: Fill from left to right in blocks of so many masked positions. The blocks share the steps evenly;
            guidance still optimises all positions. None: one block.
        threshold: Commit every position whose confidence is at least this. It is in the units of ``alg``; a step never
            commits fewer than the schedule asks, nor fewer than one. None is off.
        early_exit: Stop a text where its end is committed and nothing before is masked. The rest, which no text shows,
            is filled with that token.
        end_tokens: Which ends of a text rank last and hide what follows from the reward in guidance. ``eos`` is the one
            end-of-sequence token, as published, and ``all`` are those that the checkpoint declares (end of turn, end of
            text). Texts are cut, streamed and ended early at any of them in either case.
        temperature: Temperature tau of the draws and of the relaxed embeddings, in [1e-6, 1e6]; 0 is greedy. The most
            probable token is drawn then, and everything else is at tau = 1, as in Dream's and LLaDA's own code.
        top_p: Nucleus of the draws: an id is kept if the mass strictly ahead of it is at most this; 1 is off. So is
            None.
        top_k: Draw from the k largest logits that top_p leaves, ties included; 0 is off. So is None.
        alg: Confidence that ranks positions; random and origin take any. ``entropy``, ``maskgit_plus`` (probability of
            the drawn token), ``topk_margin`` (top-1 minus top-2 probability), ``anchor`` (raw optimised logit of the
            drawn token), ``random``: any positions, as many as the schedule asks, or ``origin``: each position commits
            independently with the schedule's probability, whatever is drawn there.
        alg_temp: Draw positions from softmax(confidence / alg_temp) instead of taking the best; 0 is off. So is None.
        entropy_rule: Which distribution the entropy confidence measures. ``initial`` is the denoiser's own logits,
            unfiltered, at tau, and ``filtered`` the optimised logits, at tau, after top-p / top-k. ``auto`` is initial
            when guided and filtered when ``guidance="none"``, as the published loops do.
        deprioritize_eos: Rank a drawn end of sequence last among the masked positions.
        guidance: Estimator of the reward's gradient; none is unguided. ``entrgi``, ``aps`` (straight-through),
            ``expectation`` (soft), ``gumbel`` (Gumbel-softmax) or ``none`` (best-of-n).
        guidance_steps: Optimiser steps per denoising step, M.
        guidance_lr: Learning rate: of Adam in logits, of SGD in logits per unit of gradient.
        guidance_interval: Which denoising steps are guided. Every k-th (those with index divisible by k), or those in a
            window (first, end), end excluded.
        optimizer: Optimiser of the logits. ``adam`` or ``sgd`` (z += lr * gradient, as TESS-2).
        gumbel_temperature: Temperature lambda of softmax((z / tau + g) / lambda), for gumbel guidance alone.
        reward_scale: Factor on the reward; -1 steers the other way. Adam normalises, so that only its sign has an
            effect there.
        logits_dtype: Dtype in which the logits are optimised. None is the denoiser's own.
        infill: Fill mask tokens in the prompts like response positions, or read them as text. True: no token that ends
            a text is drawn then. False: they are read as the text that spells them. None: in a chat as with False, and
            an error in plain text.
        max_rows: At most so many rows of logits [rows, V] at once, padding included. Trajectories run in turns, with
            the same result.
        row_bucket: Round the number of rows up to a multiple of this, so that fewer shapes occur. The result is the
            same. None: 1, or 64 with ``cuda_graphs``.
        cuda_graphs: Capture the guidance loop as CUDA graphs, one per shape. Needs models on a GPU.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """

    num_return_sequences: int = option(4, Whole(), WRITING)
    best_of: int | None = option(None, Whole(), WRITING)
    max_new_tokens: int = option(128, Whole(0), WRITING, aliases={"gen_length": {}})
    steps: int = option(128, Whole(1, MAX_STEPS), WRITING, aliases={"num_inference_steps": {}})
    schedule: str = option("paper", Choice(("paper", "rgrl", "uniform")), WRITING, presets={"rgrl": "rgrl"})
    block_length: int | None = option(None, Whole(), WRITING)
    threshold: float | None = option(None, Number("must be finite"), WRITING)
    early_exit: bool = option(False, Switch(), WRITING, aliases={"eos_early_stop": {}})
    end_tokens: str = option("eos", Choice(("eos", "all")), RANKING)
    temperature: float = option(
        0.7,
        Number("must be 0 or in [1e-6, 1e6]", lambda x: x == 0 or 1e-6 <= x <= 1e6),
        RANKING,
        presets={"rgrl": 0.9},
    )
    top_p: float = option(0.95, Number("must be in [0, 1]", lambda x: 0 <= x <= 1), RANKING, none=1.0)
    top_k: int | None = option(None, Whole(1, off=0), RANKING, presets={"rgrl": 50})
    alg: str = option(
        "entropy",
        Choice(("entropy", "maskgit_plus", "topk_margin", "anchor", "random", "origin")),
        RANKING,
        aliases={"remasking": {"low_confidence": "maskgit_plus"}},
    )
    alg_temp: float = option(0.0, Number("must be >= 0", lambda x: x >= 0), RANKING, none=0.0)
    entropy_rule: str = option("auto", Choice(("auto", "initial", "filtered")), RANKING, presets={"rgrl": "filtered"})
    deprioritize_eos: bool = option(True, Switch(), RANKING, presets={"rgrl": False})
    guidance: str = option("entrgi", Choice(GUIDANCE), STEERING)
    guidance_steps: int = option(3, Whole(), STEERING, presets={"rgrl": 1})
    guidance_lr: float = option(0.5, Number("must be > 0 and finite", lambda x: x > 0), STEERING)
    guidance_interval: int | tuple[int, int] = option(1, Interval(), STEERING)
    optimizer: str = option("adam", Choice(OPTIMIZERS), STEERING)
    gumbel_temperature: float = option(1.0, Number("must be > 0 and finite", lambda x: x > 0), STEERING)
    reward_scale: float = option(1.0, Number("must be finite"), STEERING)
    logits_dtype: torch.dtype | str | None = option(None, Dtype(), STEERING)  # noqa: RUF009
    infill: bool | None = option(None, Switch(), WRITING)
    max_rows: int | None = option(None, Whole(), MACHINE)
    row_bucket: int | None = option(None, Whole(), MACHINE)
    cuda_graphs: bool = option(False, Switch(), MACHINE)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and (each.default is None or each.metadata["none"] is not None):
                value = each.metadata["none"]
            else:
                value = each.metadata["kind"].read(each.name, value)
            object.__setattr__(self, each.name, value)
        self._check_combinations()

    def _check_combinations(self) -> None:
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise _error(name, getattr(self, name), expected)

        require(self.max_new_tokens >= 1 or bool(self.infill), "max_new_tokens", "must be an integer >= 1")
        if self.best_of is not None:
            enough = self.best_of >= self.num_return_sequences
            require(enough, "best_of", f"must be >= num_return_sequences ({self.num_return_sequences})")
        if self.alg in ("origin", "random"):
            ranks = f"with alg={self.alg!r}, which ranks nothing"
            require(self.alg_temp == 0, "alg_temp", f"must be 0 {ranks}")
            require(self.threshold is None, "threshold", f"must be None {ranks}")
        if self.threshold is not None:
            require(self.alg_temp == 0, "alg_temp", "must be 0 with a threshold")
        if self.guidance != "gumbel":
            require(self.gumbel_temperature == 1, "gumbel_temperature", "must be 1 unless guidance='gumbel'")
        else:
            require(not self.is_greedy, "temperature", "must be > 0 with guidance='gumbel', which draws")
        in_range = 1e-6 <= self.tau * self.gumbel_temperature <= 1e6
        require(in_range, "gumbel_temperature", f"times temperature ({self.temperature}) must be in [1e-6, 1e6]")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is drawn."""
        return self.temperature == 0

    @property
    def tau(self) -> float:
        """The temperature of distributions: 1 where the draws are greedy."""
        return self.temperature or 1.0

    @property
    def position_temperature(self) -> float:
        """``alg_temp``, or what draws any positions where confidences are all the same."""
        return 1.0 if self.alg == "random" else self.alg_temp

    @property
    def entropy_source(self) -> str:
        """``initial`` or ``filtered``: ``entropy_rule`` with ``auto`` resolved."""
        if self.entropy_rule != "auto":
            return self.entropy_rule
        return "filtered" if self.guidance == "none" else "initial"

    @property
    def num_trajectories(self) -> int:
        """Trajectories made per prompt: ``best_of``, or ``num_return_sequences``."""
        return self.best_of or self.num_return_sequences

    @property
    def trajectories(self) -> int:
        """The old name of ``num_trajectories``."""
        warn_renamed("SamplerConfig.trajectories", "num_trajectories")
        return self.num_trajectories

    @property
    def bucket(self) -> int:
        """``row_bucket`` with None resolved."""
        return self.row_bucket or (GRAPH_ROW_BUCKET if self.cuda_graphs else 1)

    def padded(self, rows: int) -> int:
        """``rows`` rounded up to a multiple of the row bucket."""
        return -(-rows // self.bucket) * self.bucket

    def is_guided(self, step: int) -> bool:
        """Whether denoising step ``step`` is guided."""
        if self.guidance == "none":
            return False
        if isinstance(self.guidance_interval, int):
            return step % self.guidance_interval == 0
        first, end = self.guidance_interval
        return first <= step < end


class SamplerOptions(TypedDict, total=False):
    """The options of :class:`SamplerConfig`, and their names in other samplers, as keyword arguments."""

    num_return_sequences: int
    best_of: int | None
    max_new_tokens: int
    steps: int
    schedule: str
    block_length: int | None
    threshold: float | None
    early_exit: bool
    end_tokens: str
    temperature: float
    top_p: float
    top_k: int | None
    alg: str
    alg_temp: float
    entropy_rule: str
    deprioritize_eos: bool
    guidance: str
    guidance_steps: int
    guidance_lr: float
    guidance_interval: int | tuple[int, int]
    optimizer: str
    gumbel_temperature: float
    reward_scale: float
    logits_dtype: torch.dtype | str | None
    infill: bool | None
    max_rows: int | None
    row_bucket: int | None
    cuda_graphs: bool
    gen_length: int
    num_inference_steps: int
    eos_early_stop: bool
    remasking: str


PRESETS: dict[str, dict[str, Any]] = {
    name: {f.name: f.metadata["presets"][name] for f in fields(SamplerConfig) if name in f.metadata["presets"]}
    for name in ("paper", "rgrl")
}

# By every name of an option: its own, and the values that it has under that name.
_NAMES: dict[str, tuple[str, Mapping[str, Any]]] = {
    name: (each.name, values)
    for each in fields(SamplerConfig)
    for name, values in {each.name: {}, **each.metadata["aliases"]}.items()
}


def preset(name: str, **overrides: Unpack[SamplerOptions]) -> SamplerConfig:
    """The named preset with some options replaced, e.g. ``preset("paper", steps=32, max_new_tokens=32)``.

    ``paper`` is the guided loop of arXiv 2602.05000, ``rgrl`` the sampler of its post-training code. The aliases of
    :func:`resolve` are understood.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    if name not in PRESETS:
        raise _error("preset", name, f"must be one of {', '.join(PRESETS)}")
    return SamplerConfig(**{**PRESETS[name], **_options(overrides)})


def resolve(config: SamplerConfig | str | None, options: Mapping[str, Any]) -> SamplerConfig:
    """``config`` (None is the ``paper`` preset, a string the preset of that name) with ``options`` replaced.

    The names of other samplers are understood: ``gen_length`` for ``max_new_tokens``, ``num_inference_steps`` for
    ``steps``, ``eos_early_stop`` for ``early_exit``, and ``remasking`` for ``alg`` with LLaDA's ``low_confidence`` for
    ``maskgit_plus`` (``random`` is one of ours).

    Raises:
        ValueError: for an unknown option, one given twice, or an invalid value.
    """
    if config is None or isinstance(config, str):
        return preset(config or "paper", **options)
    if not isinstance(config, SamplerConfig):
        raise _error("config", config, "must be a SamplerConfig, a preset's name or None")
    return replace(config, **_options(options)) if options else config


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their own names."""
    result = {}
    for name, value in given.items():
        if name not in _NAMES:
            raise ValueError(f"unknown option {name!r}; SamplerConfig lists the options")
        own, values = _NAMES[name]
        if own in result or (own != name and own in given):
            raise ValueError(f"{name}: {own} is given twice, expected one of the two names")
        result[own] = values.get(value, value) if isinstance(value, str) else value
    return result


def _error(name: str, value: Any, expected: str) -> ValueError:
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        shown = f"one of {value.bit_length()} bits"
    return ValueError(f"{name} {expected}, got {shown}")
