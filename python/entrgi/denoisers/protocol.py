"""What the sampler asks of a denoiser."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entrgi.prompts import Encoded, Prompt
from entrgi.sequences import check_length
from entrgi.tokenizing import named_id


class Denoiser(Protocol):
    """What the sampler needs of a masked-diffusion language model.

    Attributes:
        vocab_size: V, width of the logits.
        mask_token_id, eos_token_id, pad_token_id: ids; the last two may be None.
        end_token_ids: optional; all ids that end a response, where ``eos_token_id`` is not the only one.
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

    if TYPE_CHECKING:  # properties will do

        @property
        def device(self) -> torch.device: ...

        @property
        def dtype(self) -> torch.dtype: ...

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


def check_max_length(max_length: int | None) -> int | None:
    """``max_length``; ValueError unless it is None or an integer >= 1."""
    return None if max_length is None else check_length("denoiser: max_length", max_length)


def check_width(logits: Tensor, vocab_size: int) -> Tensor:
    """``logits``; ValueError where the model's head has become one of another width."""
    if logits.shape[-1] != vocab_size:
        raise ValueError(
            f"denoiser: the model's head was replaced after it was wrapped, by one of width {logits.shape[-1]}, "
            f"expected {vocab_size}: wrap it again"
        )
    return logits


def choose_mask_token_id(tokenizer: PreTrainedTokenizerBase, given: int | None, vocab_size: int) -> int:
    """``given``, or the tokenizer's mask token; ValueError where there is none or it lies beyond the logits."""
    mask_token_id = choose_id("mask_token_id", given, named_id(tokenizer, "mask"), vocab_size)
    if mask_token_id is None:
        raise ValueError("denoiser: its tokenizer has no mask token; expected a masked LM, or pass mask_token_id")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"denoiser: mask_token_id {mask_token_id} is not an id below vocab_size {vocab_size}")
    return mask_token_id


def choose_id(name: str, given: int | None, declared: int | None, vocab_size: int) -> int | None:
    """``given``, or else what the tokenizer declares; ValueError where ``given`` is not an id of the logits."""
    if given is None:
        return declared
    if not isinstance(given, Integral) or isinstance(given, bool) or not 0 <= given < vocab_size:
        raise ValueError(f"denoiser: {name} {given!r} is not an id below vocab_size {vocab_size}")
    return int(given)


def check_ids(encoded: Encoded, rows: int, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """``encoded``; ValueError where it holds an id beyond the ``rows`` of the input embedding."""
    for token_id in (*encoded.prefix, *encoded.body, *encoded.suffix):
        if not 0 <= token_id < rows:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise ValueError(
                f"prompts: the denoiser's tokenizer has id {token_id} for {token!r}, expected an id below {rows}, "
                "the rows of the model's embedding"
            )
    return encoded


def shifted_positions(positions: Tensor, length: int) -> Tensor:
    """Where a model that predicts the *next* token holds the logits of ``positions``, int64 [N].

    That is one to the left; the first position of each sequence of ``length`` tokens keeps its own.
    """
    return positions - (positions % length > 0).long()
