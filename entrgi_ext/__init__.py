"""Fused CPU and CUDA operators for reward-gradient guidance of masked diffusion language models.

Every public function is documented in :mod:`entrgi_ext.ops`; the operators themselves are
``torch.ops.entrgi.*``. Names are imported when first used, so that :mod:`entrgi_ext.plans` (launch plans, floors)
and ``entrgi_ext._bindings`` (their C++), which know no torch, can be imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Sample",
    "Statistics",
    "adam_step_",
    "commit_",
    "gumbel_perturb",
    "launch_plan",
    "loaded_libraries",
    "logit_gradient",
    "logit_statistics",
    "relaxed_embedding",
    "relaxed_embedding_",
    "sample_tokens",
    "sgd_step_",
    "warm_up",
]
# Where a name comes from, if not from ops.
_HOME = {
    "Sample": "reference",
    "Statistics": "reference",
    "launch_plan": "plans",
    "loaded_libraries": "registration",
}

if TYPE_CHECKING:
    from .ops import (
        adam_step_,
        commit_,
        gumbel_perturb,
        logit_gradient,
        logit_statistics,
        relaxed_embedding,
        relaxed_embedding_,
        sample_tokens,
        sgd_step_,
        warm_up,
    )
    from .plans import launch_plan
    from .reference import Sample, Statistics
    from .registration import loaded_libraries


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME.get(name, 'ops')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
