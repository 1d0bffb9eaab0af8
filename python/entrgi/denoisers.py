"""Denoisers: masked tokens in, logits at chosen positions out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.checkpoints import context_length, freeze, load_pretrained
from entrgi.prompts import Encoded, Prompt, encode_prompt, first_id


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

        The sampler overwrites the result in place.

        Args:
            tokens: int64 [P, S].
            attention_mask: int64 [P, S], 1 on real tokens; None where all are.
            positions: int64 [N], indices into the flattened [P * S].
        """
        ...


class MaskedLM:
    """Any ``AutoModelForMaskedLM`` (BERT, DistilBERT, RoBERTa, ModernBERT ...) as a denoiser.

    The sequence is ``[CLS] prompt [MASK] * L [SEP]`` with the tokenizer's own special tokens; the
    language-model head runs at the chosen positions only.

    Args:
        model: the model; it is put into evaluation mode and its parameters are frozen.
        tokenizer: its tokenizer, with a mask token.
        max_length: context in tokens; None takes what model and tokenizer declare.

    Raises:
        ValueError: for a tokenizer without a mask token, or with ids beyond the logits.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
    ) -> None:
        self.model, self.tokenizer = freeze(model), tokenizer
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"denoiser: {type(model).__name__} has no language-model head, expected a masked LM")
        self.vocab_size = head.out_features
        self.mask_token_id = _mask_token_id(tokenizer, None, self.vocab_size)
        self.eos_token_id = first_id(tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.pad_token_id = tokenizer.pad_token_id
        self.max_length = max_length or context_length(model, tokenizer)
        self.device, self.dtype = model.device, model.dtype

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        **options: object,
    ) -> MaskedLM:
        """Load a checkpoint folder or hub id; see :func:`entrgi.checkpoints.load_pretrained`."""
        model, tokenizer = load_pretrained("denoiser", name, AutoModelForMaskedLM, dtype, device, **options)
        return cls(model, tokenizer, max_length=max_length)

    def encode(self, prompt: Prompt) -> Encoded:
        """See :class:`Denoiser`. Raises ValueError for messages where the tokenizer has no chat template."""
        return encode_prompt(self.tokenizer, prompt)

    @torch.no_grad()
    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """See :class:`Denoiser`."""

        def pick(_module: nn.Module, _inputs: object, output: object) -> object:
            chosen = output[0].flatten(0, 1)[positions][None]
            if isinstance(output, tuple):
                return chosen, *output[1:]
            output.last_hidden_state = chosen
            return output

        # Every architecture names its head differently, and all of them read the encoder's output: cut that
        # down to the chosen positions on its way to the head.
        hook = self.model.base_model.register_forward_hook(pick)
        try:
            logits = self.model(input_ids=tokens, attention_mask=attention_mask).logits
        finally:
            hook.remove()
        return logits.view(positions.shape[0], self.vocab_size)


class CallableDenoiser:
    """Any callable ``(input_ids [P, S], attention_mask [P, S]) -> logits [P, S, V]`` as a denoiser.

    Args:
        function: the model; ``attention_mask`` is int64, 1 on real tokens. It may return an object with
            ``.logits``.
        tokenizer: encodes prompts (through its chat template where it has one) and decodes responses.
        vocab_size: V, width of the logits.
        mask_token_id: None takes the tokenizer's.
        eos_token_id: None takes the tokenizer's.
        shift: the model predicts the *next* position (Dream): the logits of position l come from l - 1.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        max_length: context in tokens, or None.
        device, dtype: where tokens go and what the logits' dtype is.

    Raises:
        ValueError: without a mask token id, or with ids beyond the logits.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], object],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        shift: bool = False,
        chat: bool | None = None,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.function, self.tokenizer, self.vocab_size = function, tokenizer, vocab_size
        self.mask_token_id = _mask_token_id(tokenizer, mask_token_id, vocab_size)
        self.eos_token_id = first_id(eos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.pad_token_id = tokenizer.pad_token_id
        self.shift, self.chat, self.max_length = shift, chat, max_length
        self.device, self.dtype = torch.device(device), dtype

    def encode(self, prompt: Prompt) -> Encoded:
        """See :class:`Denoiser`. Raises ValueError for messages where the tokenizer has no chat template."""
        return encode_prompt(self.tokenizer, prompt, self.chat)

    @torch.no_grad()
    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """See :class:`Denoiser`. Raises ValueError where the callable returns another shape."""
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        output = self.function(tokens, mask)
        logits = getattr(output, "logits", output)
        expected = (*tokens.shape, self.vocab_size)
        if tuple(logits.shape) != expected:
            raise ValueError(f"denoiser: expected logits of shape {list(expected)}, got {list(logits.shape)}")
        if self.shift:  # the first position of a sequence keeps its own
            positions = positions - (positions % tokens.shape[1] > 0).long()
        return logits.flatten(0, 1)[positions]


def _mask_token_id(tokenizer: PreTrainedTokenizerBase, given: int | None, vocab_size: int) -> int:
    mask_token_id = first_id(given, tokenizer.mask_token_id)
    if mask_token_id is None:
        raise ValueError("denoiser: its tokenizer has no mask token; expected a masked LM, or pass mask_token_id")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"denoiser: mask_token_id {mask_token_id} is not an id below vocab_size {vocab_size}")
    return mask_token_id
