"""What a generation is asked to do: one frozen dataclass, checked when it is made, its presets and aliases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCHEDULES = ("paper", "rgrl", "uniform")
ALGORITHMS = ("entropy", "maskgit_plus", "topk_margin", "anchor", "random", "origin")
ESTIMATORS = ("entrgi", "aps", "expectation", "gumbel")
GUIDANCE = (*ESTIMATORS, "none")
OPTIMIZERS = ("adam", "sgd")
ENTROPY_RULES = ("auto", "initial", "filtered")
END_TOKENS = ("eos", "all")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_STEPS = 2**24  # the schedules' clock is fp32, which tells no more apart
GRAPH_ROW_BUCKET = 64

# What the same option is called elsewhere: LLaDA's generate, diffusers.
ALIASES = {"gen_length": "max_new_tokens", "num_inference_steps": "steps", "remasking": "alg"}
REMASKING = {"low_confidence": "maskgit_plus"}


@dataclass(frozen=True)
class SamplerConfig:
    """Options of :func:`entrgi.generate`; the defaults are the ``paper`` preset (arXiv 2602.05000).

    Attributes:
        num_return_sequences: trajectories returned per prompt, K.
        best_of: trajectories made per prompt, N >= K, of which the K with the highest final rewards are returned,
            best first; None makes and returns K.
        max_new_tokens: response length in tokens, L; every response position starts masked. 0 only to infill.
        steps: denoising steps, T. Steps in which the schedule commits nothing cost nothing.
        schedule: how many positions a step commits: ``paper`` (Dream's, linear in time), ``rgrl`` (rounded) or
            ``uniform`` (LLaDA's, the same number in every step).
        block_length: semi-autoregressive blocks: the masked positions are filled from left to right in groups of
            this many, which share the steps evenly. Guidance still optimises all of them. None: one group.
        threshold: parallel decoding: a step commits every position whose confidence, in ``alg``'s units, is at
            least this, and never fewer than the schedule asks, nor fewer than one. None is off.
        early_exit: a trajectory stops where an end-of-sequence token is committed and nothing before it is
            masked; the rest, which no text shows, is filled with that token.
        end_tokens: which tokens hide what is behind them from the reward in guidance, and are de-prioritised: ``eos``,
            the one end-of-sequence token, as published, or ``all`` that the checkpoint declares (end of turn, end of
            text). Texts are cut, streamed and ended early at any of them in either case.
        temperature: tau of the draws and of the relaxed embeddings, in [1e-6, 1e6]; 0 is greedy: the most probable
            token is drawn, and everything else is at tau = 1, as in Dream's and LLaDA's own code.
        top_p: keep an id iff the mass strictly ahead of it is <= top_p; 1 and None are off.
        top_k: then keep the k largest logits, ties included; 0 and None are off.
        alg: confidence that ranks positions: ``entropy``, ``maskgit_plus`` (probability of the drawn
            token), ``topk_margin`` (top-1 minus top-2 probability), ``anchor`` (raw optimised logit of the
            drawn token), ``random``: any positions, as many as the schedule asks, or ``origin``: each position
            commits independently with the schedule's probability, whatever is drawn there.
        alg_temp: > 0 draws positions from softmax(confidence / alg_temp) instead of taking the best; 0 and None are
            off.
        entropy_rule: which distribution ``alg="entropy"`` measures: ``initial`` (the denoiser's own
            logits, unfiltered, at tau), ``filtered`` (optimised logits, at tau, after top-p / top-k), or
            ``auto``: initial when guided, filtered when ``guidance="none"``, as the published loops do.
        deprioritize_eos: a drawn end-of-sequence token ranks last among the masked positions.
        guidance: ``entrgi``, ``aps`` (straight-through), ``expectation`` (soft), ``gumbel`` (Gumbel-softmax) or
            ``none`` (best-of-n).
        guidance_steps: optimiser steps per denoising step, M.
        guidance_lr: learning rate: of Adam in logits, of SGD in logits per unit of gradient.
        guidance_interval: which denoising steps are guided: every k-th (those with index divisible by k), or those in
            a window (first, end), end excluded.
        optimizer: ``adam`` or ``sgd`` (z += lr * gradient, as TESS-2).
        gumbel_temperature: lambda of softmax((z / tau + g) / lambda); only with ``guidance="gumbel"``.
        reward_scale: factor on the reward. Adam normalises, so in effect its sign: -1 steers away.
        logits_dtype: dtype in which the logits are optimised; None is the denoiser's own.
        infill: mask tokens in the prompts are filled like response positions; no token that ends a text is drawn
            then. False: they are read as the text that spells them. None: in a chat as with False, and an error in
            plain text.
        max_rows: memory budget: at most so many rows of logits [rows, V] at once, padding included. Trajectories run
            in turns, with the same result.
        row_bucket: the number of rows is rounded up to a multiple of this, so that fewer shapes occur; the result
            is the same. None: 1, or 64 with ``cuda_graphs``.
        cuda_graphs: capture the guidance loop as a CUDA graph, one per shape; needs models on a GPU.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """

    num_return_sequences: int = 4
    best_of: int | None = None
    max_new_tokens: int = 128
    steps: int = 128
    schedule: str = "paper"
    block_length: int | None = None
    threshold: float | None = None
    early_exit: bool = False
    end_tokens: str = "eos"
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    alg: str = "entropy"
    alg_temp: float = 0.0
    entropy_rule: str = "auto"
    deprioritize_eos: bool = True
    guidance: str = "entrgi"
    guidance_steps: int = 3
    guidance_lr: float = 0.5
    guidance_interval: int | tuple[int, int] = 1
    optimizer: str = "adam"
    gumbel_temperature: float = 1.0
    reward_scale: float = 1.0
    logits_dtype: torch.dtype | None = None
    infill: bool | None = None
    max_rows: int | None = None
    row_bucket: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, off in {"top_p": 1.0, "alg_temp": 0.0}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, off)
        if isinstance(self.top_k, Integral) and not isinstance(self.top_k, bool) and self.top_k == 0:
            object.__setattr__(self, "top_k", None)
        for name in ("num_return_sequences", "steps", "guidance_steps"):
            self._integer(name, 1)
        for name in ("best_of", "block_length", "top_k", "max_rows", "row_bucket"):
            self._integer(name, 1, optional=True)
        if not isinstance(self.guidance_interval, tuple | list):
            self._integer("guidance_interval", 1)
        self._integer("max_new_tokens", 0 if self.infill else 1)
        for name in ("guidance_lr", "gumbel_temperature"):
            self._number(name, "must be > 0 and finite", lambda x: x > 0)
        self._number("temperature", "must be 0 or in [1e-6, 1e6]", lambda x: x == 0 or 1e-6 <= x <= 1e6)
        self._number("top_p", "must be in [0, 1]", lambda x: 0 <= x <= 1)
        self._number("alg_temp", "must be >= 0", lambda x: x >= 0)
        self._number("reward_scale", "must be finite", lambda x: True)
        if self.threshold is not None:
            self._number("threshold", "must be finite", lambda x: True)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, name, value, f"must be one of {', '.join(allowed)}")
        for name in ("early_exit", "deprioritize_eos", "infill", "cuda_graphs"):
            value = getattr(self, name)
            if name == "infill" and value is None:
                continue
            is_bool = isinstance(value, bool) or str(getattr(value, "dtype", None)) == "bool"  # numpy's, too
            _require(is_bool, name, value, "must be True or False")
            object.__setattr__(self, name, bool(value))
        dtype, dtypes = self.logits_dtype, "must be None or a floating torch dtype"
        known = dtype is None or (type(dtype).__module__ == "torch" and str(dtype).removeprefix("torch.") in DTYPES)
        _require(known, "logits_dtype", dtype, dtypes)
        _require(self.steps <= MAX_STEPS, "steps", self.steps, f"must be <= {MAX_STEPS}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.best_of is not None:
            expected = f"must be >= num_return_sequences ({self.num_return_sequences})"
            _require(self.best_of >= self.num_return_sequences, "best_of", self.best_of, expected)
        if self.alg in ("origin", "random"):
            ranks = f"with alg={self.alg!r}, which ranks nothing"
            _require(self.alg_temp == 0, "alg_temp", self.alg_temp, f"must be 0 {ranks}")
            _require(self.threshold is None, "threshold", self.threshold, f"must be None {ranks}")
        if self.threshold is not None:
            _require(self.alg_temp == 0, "alg_temp", self.alg_temp, "must be 0 with a threshold")
        if self.guidance != "gumbel":
            expected = "must be 1 unless guidance='gumbel'"
            _require(self.gumbel_temperature == 1, "gumbel_temperature", self.gumbel_temperature, expected)
        elif self.is_greedy:
            _require(False, "temperature", self.temperature, "must be > 0 with guidance='gumbel', which draws")
        expected = f"times temperature ({self.temperature}) must be in [1e-6, 1e6]"
        in_range = 1e-6 <= self.tau * self.gumbel_temperature <= 1e6
        _require(in_range, "gumbel_temperature", self.gumbel_temperature, expected)
        if not isinstance(self.guidance_interval, int):
            window = tuple(self.guidance_interval)
            is_window = len(window) == 2 and all(isinstance(x, Integral) and not isinstance(x, bool) for x in window)
            expected = "must be an integer >= 1 or a window (first, end) with 0 <= first < end"
            ordered = is_window and 0 <= window[0] < window[1]
            _require(ordered, "guidance_interval", self.guidance_interval, expected)
            _require(window[1] < 2**63, "guidance_interval", self.guidance_interval, "must be integers of 64 bits")
            object.__setattr__(self, "guidance_interval", (int(window[0]), int(window[1])))

    def _number(self, name: str, expected: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        _require(is_number and holds(value), name, value, expected)
        object.__setattr__(self, name, float(value))  # numpy's scalars, too

    def _integer(self, name: str, minimum: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        _require(is_integer and value >= minimum, name, value, f"must be an integer >= {minimum}")
        _require(value < 2**63, name, value, "must be an integer of 64 bits")
        object.__setattr__(self, name, int(value))

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
    def trajectories(self) -> int:
        """Trajectories made per prompt: ``best_of``, or ``num_return_sequences``."""
        return self.best_of or self.num_return_sequences

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


CHOICES = {
    "schedule": SCHEDULES,
    "alg": ALGORITHMS,
    "guidance": GUIDANCE,
    "optimizer": OPTIMIZERS,
    "entropy_rule": ENTROPY_RULES,
    "end_tokens": END_TOKENS,
}
PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "rgrl": {
        "guidance_steps": 1,
        "temperature": 0.9,
        "top_k": 50,
        "schedule": "rgrl",
        "entropy_rule": "filtered",
        "deprioritize_eos": False,
    },
}


def preset(name: str, **overrides: object) -> SamplerConfig:
    """The named preset with some options replaced, e.g. ``preset("paper", steps=32, max_new_tokens=32)``.

    ``paper`` is the guided loop of arXiv 2602.05000, ``rgrl`` the sampler of its post-training code. The aliases of
    :func:`resolve` are understood.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    _require(name in PRESETS, "preset", name, f"must be one of {', '.join(PRESETS)}")
    return SamplerConfig(**{**PRESETS[name], **_options(overrides)})


def resolve(config: SamplerConfig | str | None, options: Mapping[str, object]) -> SamplerConfig:
    """``config`` (None is the ``paper`` preset, a string the preset of that name) with ``options`` replaced.

    The names of other samplers are understood: ``gen_length`` for ``max_new_tokens``, ``num_inference_steps`` for
    ``steps``, and ``remasking`` for ``alg`` with LLaDA's ``low_confidence`` for ``maskgit_plus`` (``random`` is one of
    ours).

    Raises:
        ValueError: for an unknown option, one given twice, or an invalid value.
    """
    if config is None or isinstance(config, str):
        return preset(config or "paper", **options)
    _require(isinstance(config, SamplerConfig), "config", config, "must be a SamplerConfig, a preset's name or None")
    return replace(config, **_options(options)) if options else config


def _options(given: Mapping[str, object]) -> dict[str, object]:
    """Options by their own names."""
    known = {field.name for field in fields(SamplerConfig)}
    result = {}
    for name, value in given.items():
        own = ALIASES.get(name, name)
        if own not in known:
            raise ValueError(f"unknown option {name!r}; SamplerConfig lists the options")
        if own in result or (own != name and own in given):
            raise ValueError(f"{name}: {own} is given twice, expected one of the two names")
        result[own] = REMASKING.get(value, value) if name == "remasking" and isinstance(value, str) else value
    return result


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"one of {value.bit_length()} bits"
