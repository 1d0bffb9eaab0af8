"""The embedded pair as a denoiser and a reward, by the arguments of ``load_denoiser`` and ``load_reward``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from entrgi.config import DTYPES

from . import load_denoiser, load_reward

if TYPE_CHECKING:
    from entrgi.denoisers import MaskedLM
    from entrgi.rewards import SequenceClassifierReward

NAME = "demo"
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")  # nothing is fetched, so they change nothing


def denoiser(
    *,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    adapter: object = None,
    **options: Any,
) -> MaskedLM:
    """The review writer; ``options`` of :class:`entrgi.MaskedLM`. Raises ValueError for others, and for an adapter."""
    from entrgi.denoisers import MaskedLM
    from entrgi.denoisers.base import OwnOptions

    network, tokenizer = load_denoiser(_dtype("denoiser", dtype))
    given = _own("denoiser", OwnOptions.__annotations__, adapter, options)
    return MaskedLM(_moved(network, device), tokenizer, **given)


def reward(
    *,
    kind: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    adapter: object = None,
    **options: Any,
) -> SequenceClassifierReward:
    """The sentiment; ``options`` of :class:`entrgi.SequenceClassifierReward`. Raises ValueError as :func:`denoiser`."""
    from entrgi.rewards import SequenceClassifierReward
    from entrgi.rewards.options import OPTION_NAMES

    if kind not in (None, "classifier"):
        raise ValueError(f"kind: the embedded pair's reward is a classifier, got {kind!r}")
    network, tokenizer = load_reward(_dtype("reward", dtype))
    given = _own("reward", ("label", *OPTION_NAMES), adapter, options)
    return SequenceClassifierReward(_moved(network, device), tokenizer, **given)


def _moved(network: Any, device: str | int | torch.device | None) -> Any:
    return network.to("cpu" if device is None else device)


def _dtype(argument: str, dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"{argument}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        return getattr(torch, dtype)
    return torch.float32 if dtype is None else dtype


def _own(argument: str, known: Iterable[str], adapter: object, options: dict[str, Any]) -> dict[str, Any]:
    if adapter is not None:
        raise ValueError(f"{argument}: the embedded pair takes no adapter, got {adapter!r}")
    given = {name: value for name, value in options.items() if name not in _OF_THE_HUB and value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{argument}: the embedded pair takes no {unknown[0]}, got {given[unknown[0]]!r}")
    return given
