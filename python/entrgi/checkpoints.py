"""Model files from a local folder or a hub id, complete or refused; code from a repository is never run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_pretrained(
    argument: str,
    name: str | Path,
    auto_class: type,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    **options: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``name``, the model frozen, in evaluation mode and on ``device``.

    Args:
        argument: what to call it in an error, ``denoiser`` or ``reward``.
        name: a folder with config.json, safetensors and tokenizer files, or a hub id.
        auto_class: such as ``AutoModelForMaskedLM``.
        dtype: of the weights; None keeps the checkpoint's.
        options: passed to ``from_pretrained``.

    Raises:
        ValueError: for a folder that does not exist or lacks files, a hub id that cannot be had, or a
            checkpoint that lacks weights of ``auto_class`` (they would be random).
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{argument}: folder {str(name)!r} has no config.json")
    elif path.exists() or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{argument}: no folder {str(name)!r}, expected a checkpoint folder or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = auto_class.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{argument}: cannot load {str(name)!r}: {error}") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up by transformers
        raise ValueError(f"{argument}: {str(name)!r} has no tokenizer files")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{argument}: {str(name)!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]!r}"
        )
    return freeze(model).to(device or "cpu"), tokenizer


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in evaluation mode, its parameters without gradient."""
    return model.eval().requires_grad_(False)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest sequence, in tokens, that model and tokenizer declare; None where neither does."""
    limits = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from padding_idx + 1.
        counts_from = table.padding_idx if isinstance(table, nn.Embedding) else None
        limits.append(positions if counts_from is None else positions - counts_from - 1)
    if tokenizer.model_max_length < 10**9:  # tokenizers without a limit say 1e30
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)
