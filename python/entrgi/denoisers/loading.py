"""One entry for every kind of checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from entrgi.demo import pair as demo
from entrgi.denoisers.base import DenoiserOptions
from entrgi.denoisers.causal import BidirectionalLM
from entrgi.denoisers.dream import DreamDenoiser
from entrgi.denoisers.llada import LLaDADenoiser
from entrgi.denoisers.masked_lm import MaskedLM
from entrgi.models.checkpoints import find_checkpoint
from entrgi.models.fields import architectures_of, model_type_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CLASSES = (DreamDenoiser, LLaDADenoiser)


def load_denoiser(name: str | Path, **options: Unpack[DenoiserOptions]) -> BidirectionalLM | MaskedLM:
    """Load a denoiser; its config.json says which class it is. No code of a checkpoint is run.

    Example::

        denoiser = entrgi.load_denoiser("Dream-org/Dream-v0-Instruct-7B", dtype=torch.bfloat16, device="cuda")

    Args:
        name: a folder with config.json, safetensors and tokenizer files, or a hub id: a
            :class:`DreamDenoiser`, a :class:`LLaDADenoiser`, or for any ``AutoModelForMaskedLM`` a :class:`MaskedLM`.
            ``demo`` is the embedded pair's.
        options: ``dtype``, ``device``, ``adapter``; ``mask_token_id``, ``eos_token_id``, ``pad_token_id`` for a
            checkpoint that does not say them, or says others; ``chat``, ``chat_template_kwargs``, ``max_length``,
            ``compile``; ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``. What each means:
            :class:`entrgi.denoisers.base.DenoiserOptions`.

    Raises:
        ValueError: for a checkpoint that cannot be had, is of another kind, or is not complete.
    """
    if name == demo.NAME:
        return demo.denoiser(**options)
    _, fields = find_checkpoint("denoiser", name, options, with_weights=False)
    return _class_of(name, fields).from_pretrained(name, **options)


def _class_of(name: str | Path, fields: Mapping[str, Any]) -> type[BidirectionalLM] | type[MaskedLM]:
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
