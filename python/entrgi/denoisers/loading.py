"""One entry for every kind of checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from entrgi.checkpoints import hub, refuse_remote_code
from entrgi.demo import pair as demo
from entrgi.denoisers.causal import BidirectionalLM
from entrgi.denoisers.dream import DreamDenoiser
from entrgi.denoisers.llada import LLaDADenoiser
from entrgi.denoisers.masked_lm import MaskedLM
from entrgi.models.errors import loading
from entrgi.models.fields import architectures_of, model_type_of, read_fields
from entrgi.models.files import check_checkpoint, checkpoint_folder

_CLASSES = (DreamDenoiser, LLaDADenoiser)


def load_denoiser(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    max_length: int | None = None,
    compile: bool = False,
    **options: object,
) -> BidirectionalLM | MaskedLM:
    """Load a denoiser; its config.json says which class it is. No code of a checkpoint is run.

    Example::

        denoiser = entrgi.load_denoiser("Dream-org/Dream-v0-Instruct-7B", dtype=torch.bfloat16, device="cuda")

    Args:
        name: a folder with config.json, safetensors and tokenizer files, or a hub id: a
            :class:`DreamDenoiser`, a :class:`LLaDADenoiser`, or for any ``AutoModelForMaskedLM`` a :class:`MaskedLM`.
            ``demo`` is the embedded pair's.
        dtype: of the weights; None keeps the checkpoint's.
        device: a name or an index; None is the CPU.
        adapter: a LoRA adapter (folder or hub id), or several: merged into the weights, in turn; needs ``peft``.
        mask_token_id, eos_token_id, pad_token_id: for a checkpoint that does not say them, or says others; several
            ids may end a response.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``.
        max_length: context in tokens; None takes what model and tokenizer declare.
        compile: compile the transformer blocks with ``torch.compile``, on their first call.
        options: for the hub, such as ``revision``, ``cache_dir``, ``token`` and ``local_files_only``.

    Raises:
        ValueError: for a checkpoint that cannot be had, is of another kind, or is not complete.
    """
    arguments = {
        "dtype": dtype,
        "device": device,
        "adapter": adapter,
        "mask_token_id": mask_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "chat": chat,
        "chat_template_kwargs": chat_template_kwargs,
        "max_length": max_length,
        "compile": compile,
        **options,
    }
    if name == demo.NAME:
        return demo.denoiser(**arguments)
    subfolder = options.get("subfolder") or ""
    check_checkpoint("denoiser", name, subfolder)
    refuse_remote_code("denoiser", options)
    with loading("denoiser", name):
        folder = checkpoint_folder("denoiser", name, subfolder=subfolder, with_weights=False, **hub(options))
        cls = _class_of(name, read_fields("denoiser", folder))
    return cls.from_pretrained(name, **arguments)


def _class_of(name: str | Path, fields: Mapping[str, object]) -> type[BidirectionalLM] | type[MaskedLM]:
    """The class for a config.json: by ``model_type``, or where that is missing by ``architectures``."""
    model_type, architectures = fields.get("model_type"), architectures_of(fields)
    for cls in _CLASSES:
        if model_type == cls.model_type or (model_type is None and cls.architecture in architectures):
            return cls
    if model_type_of(fields) in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return MaskedLM
    raise ValueError(
        f"denoiser: config.json of {str(name)!r} has model_type {model_type!r}, expected one of "
        f"{', '.join(repr(cls.model_type) for cls in _CLASSES)} or a masked language model, got architectures "
        f"{', '.join(architectures) or None}; load anything else yourself and pass it to CallableDenoiser"
    )
