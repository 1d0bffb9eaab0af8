"""A reward by its checkpoint: the class follows from what the checkpoint says it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entrgi.demo import pair as demo
from entrgi.models.adapters import adapter_task, adapters_of
from entrgi.models.checkpoints import hub, read_config, refuse_remote_code
from entrgi.rewards.classifier import SequenceClassifierReward
from entrgi.rewards.likelihood import LogLikelihoodReward

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from entrgi.rewards.options import LoadingArguments

KINDS = {"classifier": SequenceClassifierReward, "likelihood": LogLikelihoodReward}


def load_reward(
    name: str | Path,
    *,
    kind: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    **options: Unpack[LoadingArguments],
) -> SequenceClassifierReward | LogLikelihoodReward:
    """Load a reward model from a checkpoint folder or hub id.

    A sequence classifier becomes a :class:`SequenceClassifierReward`, a causal language model a
    :class:`LogLikelihoodReward`. A LoRA adapter that was trained as a classifier makes its base model one.

    Args:
        name: a folder with config.json, safetensors and tokenizer files, or a hub id. ``demo`` is the embedded pair's.
        kind: ``classifier`` or ``likelihood``; None decides by the checkpoint.
        dtype: of the weights; None keeps the checkpoint's.
        device: a name or an index; None is the CPU, or wherever ``device_map`` or a quantised checkpoint puts it.
        adapter: folder or hub id of a LoRA adapter, merged into the weights (needs peft); several are merged in turn.
        options: of the class (``label`` for a classifier with several, ``normalize`` for a likelihood, and those of
            :class:`entrgi.rewards.options.ModelRewardOptions`); others go to ``from_pretrained``.

    Raises:
        ValueError: for an unknown kind, a checkpoint that is neither, or files that are missing or do not fit.
    """
    if name == demo.NAME:
        return demo.reward(kind=kind, dtype=dtype, device=device, adapter=adapter, **options)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    refuse_remote_code("reward", options)
    architectures = read_config("reward", name, **options).architectures or []
    classifies = any(a.endswith("ForSequenceClassification") for a in architectures)
    if kind is None:
        adapters = [] if adapter is None else adapters_of("reward", adapter)
        if classifies or any(adapter_task("reward", name, **hub(options)) == "SEQ_CLS" for name in adapters):
            kind = "classifier"
        elif any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
            kind = "likelihood"
        else:
            raise ValueError(
                f"reward: {str(name)!r} is {' or '.join(architectures) or 'of no architecture'}, expected a sequence "
                "classifier or a causal language model; pass kind='classifier' or 'likelihood' to choose"
            )
    if kind == "classifier" and not classifies:
        given: Any = options
        given.setdefault("num_labels", 1)  # the base of an adapter counts two labels, whatever the adapter has
    return KINDS[kind].from_pretrained(name, dtype=dtype, device=device, adapter=adapter, **options)
