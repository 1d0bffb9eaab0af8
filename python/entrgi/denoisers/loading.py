"""One entry for every kind of checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from entrgi.checkpoints import cannot_load, check_checkpoint, refuse_remote_code
from entrgi.demo import pair as demo
from entrgi.denoisers.causal import BidirectionalLM
from entrgi.denoisers.dream import DreamDenoiser
from entrgi.denoisers.llada import LLaDADenoiser
from entrgi.denoisers.masked_lm import MaskedLM

_CLASSES = {cls.model_type: cls for cls in (DreamDenoiser, LLaDADenoiser)}


def load_denoiser(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
    chat: bool | None = None,
    max_length: int | None = None,
    compile: bool = False,
    **options: object,
) -> BidirectionalLM | MaskedLM:
    """Load a denoiser; ``model_type`` in its config.json says which class it is. No code of a checkpoint is run.

    Example::

        denoiser = entrgi.load_denoiser("Dream-org/Dream-v0-Instruct-7B", dtype=torch.bfloat16, device="cuda")

    Args:
        name: a folder with config.json, safetensors and tokenizer files, or a hub id: a
            :class:`DreamDenoiser`, a :class:`LLaDADenoiser`, or for any ``AutoModelForMaskedLM`` a :class:`MaskedLM`.
            ``demo`` is the embedded pair's.
        dtype: of the weights; None keeps the checkpoint's.
        device: None is the CPU.
        adapter: a LoRA adapter (folder or hub id) to merge into the weights; needs ``peft``.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        max_length: context in tokens; None takes what model and tokenizer declare.
        compile: compile the transformer blocks with ``torch.compile``, on their first call.
        options: for the hub, such as ``revision``, ``cache_dir``, ``token`` and ``local_files_only``.

    Raises:
        ValueError: for a checkpoint that cannot be had, is of another kind, or is not complete.
    """
    if name == demo.NAME:
        return demo.denoiser(
            dtype=dtype,
            device=device,
            adapter=adapter,
            chat=chat,
            max_length=max_length,
            compile=compile,
            **options,
        )
    check_checkpoint("denoiser", name)
    refuse_remote_code("denoiser", options)
    try:
        fields, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError) as error:
        raise cannot_load("denoiser", name, error) from error
    model_type = fields.get("model_type")
    cls = _CLASSES.get(model_type, MaskedLM if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else None)
    if cls is None:
        raise ValueError(
            f"denoiser: config.json of {str(name)!r} has model_type {model_type!r}, expected one of "
            f"{', '.join(map(repr, _CLASSES))} or a masked language model; load anything else yourself "
            "and pass it to CallableDenoiser"
        )
    return cls.from_pretrained(
        name, dtype=dtype, device=device, adapter=adapter, chat=chat, max_length=max_length, compile=compile, **options
    )
