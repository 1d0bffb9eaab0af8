"""Reward-gradient guidance for masked diffusion language models.

Names load on first use, so that ``entrgi doctor`` can report an installation whose operators do not load.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entrgi.config import SamplerConfig, preset
    from entrgi.denoisers import CallableDenoiser, DreamDenoiser, LLaDADenoiser, MaskedLM, load_denoiser
    from entrgi.guidance import GuidanceOutput, optimize_logits
    from entrgi.outputs import History, Output, StepState
    from entrgi.rewards import (
        CallableReward,
        LogLikelihoodReward,
        SequenceClassifierReward,
        WeightedReward,
        load_reward,
    )
    from entrgi.sampler import generate

_HOME = {
    "CallableDenoiser": "denoisers",
    "CallableReward": "rewards",
    "DreamDenoiser": "denoisers",
    "GuidanceOutput": "guidance",
    "History": "outputs",
    "LLaDADenoiser": "denoisers",
    "LogLikelihoodReward": "rewards",
    "MaskedLM": "denoisers",
    "Output": "outputs",
    "SamplerConfig": "config",
    "SequenceClassifierReward": "rewards",
    "StepState": "outputs",
    "WeightedReward": "rewards",
    "generate": "sampler",
    "load_denoiser": "denoisers",
    "load_reward": "rewards",
    "optimize_logits": "guidance",
    "preset": "config",
}
__all__ = [
    "CallableDenoiser",
    "CallableReward",
    "DreamDenoiser",
    "GuidanceOutput",
    "History",
    "LLaDADenoiser",
    "LogLikelihoodReward",
    "MaskedLM",
    "Output",
    "SamplerConfig",
    "SequenceClassifierReward",
    "StepState",
    "WeightedReward",
    "generate",
    "load_denoiser",
    "load_reward",
    "optimize_logits",
    "preset",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version("entrgi")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
