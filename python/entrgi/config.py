"""What a generation is asked to do: one frozen dataclass, checked when it is made, and its presets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ALGORITHMS = ("entropy", "maskgit_plus", "topk_margin", "anchor")
GUIDANCE = ("entrgi", "aps", "expectation", "none")
ENTROPY_RULES = ("auto", "initial", "filtered")
LOGITS_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SamplerConfig:
    """Options of :func:`entrgi.generate`; the defaults are the ``paper`` preset (arXiv 2602.05000).

    Attributes:
        num_return_sequences: trajectories per prompt, K.
        max_new_tokens: response length in tokens, L; every response position starts masked. 0 only to infill.
        steps: denoising steps, T. Steps in which the schedule commits nothing cost nothing.
        temperature: tau of the draws and of the relaxed embeddings, in [1e-6, 1e6].
        top_p: keep an id iff the mass strictly ahead of it is <= top_p; 1 is off.
        top_k: then keep the k largest logits, ties included; None is off.
        alg: confidence that ranks positions: ``entropy``, ``maskgit_plus`` (probability of the drawn
            token), ``topk_margin`` (top-1 minus top-2 probability) or ``anchor`` (raw optimised logit of the
            drawn token).
        alg_temp: > 0 draws positions from softmax(confidence / alg_temp) instead of taking the best.
        entropy_rule: which distribution ``alg="entropy"`` measures: ``initial`` (the denoiser's own
            logits, unfiltered, at tau), ``filtered`` (optimised logits, at tau, after top-p / top-k), or
            ``auto``: initial when guided, filtered when ``guidance="none"``, as the published loops do.
        guidance: ``entrgi``, ``aps`` (straight-through), ``expectation`` (soft) or ``none`` (best-of-n).
        guidance_steps: Adam steps per denoising step, M.
        guidance_lr: Adam learning rate, in logits.
        reward_scale: factor on the reward. Adam normalises, so in effect its sign: -1 steers away.
        logits_dtype: dtype in which the logits are optimised; None is the denoiser's own.
        deprioritize_eos: a drawn end-of-sequence token ranks last among the masked positions.
        infill: allow mask tokens in the prompts; they are filled like response positions. The end-of-sequence
            token is not drawn then.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """

    num_return_sequences: int = 4
    max_new_tokens: int = 128
    steps: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int | None = None
    alg: str = "entropy"
    alg_temp: float = 0.0
    entropy_rule: str = "auto"
    guidance: str = "entrgi"
    guidance_steps: int = 3
    guidance_lr: float = 0.5
    reward_scale: float = 1.0
    logits_dtype: torch.dtype | None = None
    deprioritize_eos: bool = True
    infill: bool = False

    def __post_init__(self) -> None:
        for name in ("num_return_sequences", "steps", "guidance_steps"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("max_new_tokens", self.max_new_tokens, 0 if self.infill else 1)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1)
        for name in ("temperature", "guidance_lr"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "must be > 0 and finite")
        _require(1e-6 <= self.temperature <= 1e6, "temperature", self.temperature, "must be in [1e-6, 1e6]")
        _require(_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", self.top_p, "must be in [0, 1]")
        _require(_is_number(self.alg_temp) and self.alg_temp >= 0, "alg_temp", self.alg_temp, "must be >= 0")
        _require(_is_number(self.reward_scale), "reward_scale", self.reward_scale, "must be finite")
        choices = {"alg": ALGORITHMS, "guidance": GUIDANCE, "entropy_rule": ENTROPY_RULES}
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, value, f"must be one of {', '.join(allowed)}")
        dtypes = "must be None or a floating torch dtype"
        _require(self.logits_dtype in LOGITS_DTYPES, "logits_dtype", self.logits_dtype, dtypes)

    @property
    def entropy_source(self) -> str:
        """``initial`` or ``filtered``: ``entropy_rule`` with ``auto`` resolved."""
        if self.entropy_rule != "auto":
            return self.entropy_rule
        return "filtered" if self.guidance == "none" else "initial"


PRESETS: dict[str, dict[str, object]] = {"paper": {}}


def preset(name: str, **overrides: object) -> SamplerConfig:
    """The named preset with some options replaced, e.g. ``preset("paper", steps=32, max_new_tokens=32)``.

    Raises:
        ValueError: for an unknown preset or an invalid option.
    """
    _require(name in PRESETS, "preset", name, f"must be one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - SamplerConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"unknown option {sorted(unknown)[0]!r}; SamplerConfig lists the options")
    return SamplerConfig(**{**PRESETS[name], **overrides})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, minimum: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _require(is_integer and value >= minimum, name, value, f"must be an integer >= {minimum}")


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} {expected}, got {value!r}")
