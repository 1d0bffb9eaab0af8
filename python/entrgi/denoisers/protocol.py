"""What the sampler asks of a denoiser."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entrgi.prompts import Encoded, Prompt, first_id


class Denoiser(Protocol):
    """What the sampler needs of a masked-diffusion language model.

    Attributes:
        vocab_size: V, width of the logits.
        mask_token_id, eos_token_id, pad_token_id: ids; the last two may be None.
        max_length: context in tokens, or None.
        device, dtype: of the model's weights and logits.
        tokenizer: decodes the response.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    mask_token_id: int
    eos_token_id: int | None
    pad_token_id: int | None
    max_length: int | None
    device: torch.device
    dtype: torch.dtype

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt as token ids; see :class:`entrgi.prompts.Encoded`."""
        ...

    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Logits [N, V] for the tokens *at* ``positions``; a model that predicts the next one shifts them.

        The sampler overwrites the result in place, and a CUDA device never waits for the host inside.

        Args:
            tokens: int64 [P, S].
            attention_mask: int64 [P, S], 1 on real tokens; None where all are.
            positions: int64 [N], indices into the flattened [P * S].
        """
        ...


def choose_mask_token_id(tokenizer: PreTrainedTokenizerBase, given: int | None, vocab_size: int) -> int:
    """``given``, or the tokenizer's mask token; ValueError where there is none or it lies beyond the logits."""
    mask_token_id = first_id(given, tokenizer.mask_token_id)
    if mask_token_id is None:
        raise ValueError("denoiser: its tokenizer has no mask token; expected a masked LM, or pass mask_token_id")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"denoiser: mask_token_id {mask_token_id} is not an id below vocab_size {vocab_size}")
    return mask_token_id


def shifted_positions(positions: Tensor, length: int) -> Tensor:
    """Where a model that predicts the *next* token holds the logits of ``positions``, int64 [N].

    That is one to the left; the first position of each sequence of ``length`` tokens keeps its own.
    """
    return positions - (positions % length > 0).long()
