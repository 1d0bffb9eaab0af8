"""Any function or module as a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrgi.denoisers.base import BaseDenoiser, TokenOptions
from entrgi.denoisers.protocol import shifted_positions
from entrgi.models.generation import declared_end_ids
from entrgi.models.placement import choose_device, choose_dtype
from entrgi.models.wrapping import callable_twin, check_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CallableDenoiser(BaseDenoiser):
    """Any callable ``(input_ids [P, S], attention_mask [P, S]) -> logits [P, S, V]`` as a denoiser.

    Both arguments go by position, and ``attention_mask`` is always a tensor. A ``PreTrainedModel``, such as one
    that you loaded from a repository with its own code, gets them by name (its second parameter may be
    another one), ``attention_mask`` being None where nothing is padded. Modules run in evaluation mode and without
    gradients through a twin that shares their weights, and are not changed themselves.

    Args:
        function: the model; ``attention_mask`` is int64, 1 on real tokens. It may return an object with
            ``.logits``.
        tokenizer: encodes prompts (through its chat template where it has one) and decodes responses.
        vocab_size: V, width of the logits; None takes a module's ``config.vocab_size``.
        mask_token_id: None takes the tokenizer's.
        pad_token_id: None takes the tokenizer's.
        eos_token_id: an id or several that end a response; None takes what tokenizer, config.json,
            generation_config.json and chat template say. The first one fills what early_exit leaves.
        shift: the model predicts the *next* position (Dream): the logits of position l come from l - 1.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        max_length: context in tokens, or None.
        device, dtype: where tokens go and what the logits' dtype is; None takes a module's own, and the CPU
            and float32 for anything else.

    Raises:
        ValueError: without a vocabulary size or a mask token id, or with ids beyond the logits.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        *,
        shift: bool = False,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Unpack[TokenOptions],
    ) -> None:
        if not callable(function):
            raise ValueError(f"denoiser: expected a callable, got {type(function).__name__}")
        check_tokenizer("denoiser", tokenizer)
        function, self._twin = callable_twin("denoiser", function)
        if vocab_size is None:
            vocab_size = getattr(getattr(function, "config", None), "vocab_size", None)
        if vocab_size is None:
            raise ValueError("denoiser: vocab_size is None, expected the width of the logits")
        self._settle(tokenizer, vocab_size, declared_end_ids(function), **options)
        self.function, self.shift = function, shift
        self._device, self._dtype = choose_device("denoiser: device", device), choose_dtype("denoiser", dtype)

    @property
    def device(self) -> torch.device:
        """What was given, or the module's, as it is now."""
        weight = self._weight()
        return self._device or (torch.device("cpu") if weight is None else weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """What was given, or the module's, as it is now."""
        weight = self._weight()
        return self._dtype or (torch.float32 if weight is None else weight.dtype)

    def _weight(self) -> Tensor | None:
        return None if self._twin is None else next(self._twin.source.parameters(), None)

    @torch.no_grad()
    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """See :class:`Denoiser`. Raises ValueError where the callable returns another shape."""
        if self._twin is not None:
            self._twin.refresh()
        if isinstance(self.function, PreTrainedModel):
            output = self.function(input_ids=tokens, attention_mask=attention_mask)
        else:
            output = self.function(tokens, torch.ones_like(tokens) if attention_mask is None else attention_mask)
        logits = getattr(output, "logits", output)
        expected = (*tokens.shape, self.vocab_size)
        if tuple(logits.shape) != expected:
            raise ValueError(f"denoiser: expected logits of shape {list(expected)}, got {list(logits.shape)}")
        if self.shift:
            positions = shifted_positions(positions, tokens.shape[1])
        return logits.flatten(0, 1)[positions]
