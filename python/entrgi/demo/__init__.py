"""The embedded demo pair: a masked-diffusion review writer and a sentiment reward.

Both are DistilBERT models over one vocabulary of word pieces, so token ids and word embeddings
agree between them. They need no network and load in about a second. ``MODEL_CARD.md`` beside this
file tells what they were trained on, and ``figures.json`` how well they do.

    >>> model, tokenizer = load_denoiser()
    >>> ids = tokenizer("The movie was" + " [MASK]" * 8, return_tensors="pt").input_ids
    >>> model(input_ids=ids).logits.shape  # [CLS] + 3 words + 8 masks + [SEP]
    torch.Size([1, 13, 8192])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .weights import DemoFilesError, read_denoiser, read_reward, verify

__all__ = ["DemoFilesError", "load_denoiser", "load_reward", "load_tokenizer"]

_FOLDER = Path(__file__).resolve().parent


def load_denoiser(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the masked-diffusion denoiser, a ``DistilBertForMaskedLM``.

    It reads ``[CLS] text [SEP]`` with ``[MASK]`` at the positions to write (up to 126 tokens; it
    was trained on texts of 4 to 32) and returns logits ``[B, S, 8192]``, not shifted: those at a
    position are for the token of that position. Attention is bidirectional.

    Args:
        dtype: dtype of all parameters.

    Returns:
        The model in eval mode, its parameters frozen, on the CPU; and the tokenizer.

    Raises:
        DemoFilesError: a file of the pair is missing or damaged.
    """
    verify(_FOLDER)
    folder = _FOLDER / "denoiser"
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    return _finish(model, read_denoiser(_FOLDER), dtype), load_tokenizer()


def load_reward(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the sentiment reward, a ``DistilBertForSequenceClassification`` with one output.

    It reads ``[CLS] text [SEP]``, as ids or as word embeddings ``inputs_embeds [B, S, 768]``
    (positions are added inside), and returns logits ``[B, 1]``: the valence of the text, from
    about -4 (very negative) to 4 (very positive). The state of ``[CLS]`` is what it pools.

    Args:
        dtype: dtype of all parameters.

    Returns:
        The model in eval mode, its parameters frozen, on the CPU; and the tokenizer.

    Raises:
        DemoFilesError: a file of the pair is missing or damaged.
    """
    verify(_FOLDER)
    folder = _FOLDER / "reward"
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation="eager"
    )
    return _finish(model, read_reward(_FOLDER), dtype), load_tokenizer()


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return the cased word-piece tokenizer that both models share.

    Raises:
        DemoFilesError: the tokenizer's file is missing or damaged.
    """
    verify(_FOLDER, only="tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(_FOLDER / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        # DistilBERT takes no token types, which transformers 4 would hand out by default.
        model_input_names=["input_ids", "attention_mask"],
        # "good ." -> "good."
        clean_up_tokenization_spaces=True,
    )


def _finish(model: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model.load_state_dict(state)
    return model.to(dtype).eval().requires_grad_(False)
