"""What denoisers share: options, which ids mean what, prompts to ids, and where the model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from entrgi.denoisers.ends import choose_end_ids
from entrgi.denoisers.protocol import check_ids, check_max_length, choose_id, choose_mask_token_id
from entrgi.models.wrapping import check_tokenizer
from entrgi.prompts import Encoded, Prompt, check_template_options, encode_prompt
from entrgi.tokenizing import named_id


class TokenOptions(TypedDict, total=False):
    """What every denoiser takes beside model and tokenizer.

    Attributes:
        mask_token_id, pad_token_id: None takes what the checkpoint says.
        eos_token_id: an id or several that end a response; None takes what tokenizer, config.json,
            generation_config.json and chat template say. The first one fills what early_exit leaves.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        max_length: context in tokens; None takes what model and tokenizer declare.
    """

    mask_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    chat: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    max_length: int | None


class OwnOptions(TokenOptions, total=False):
    """What the class of a denoiser takes.

    Attributes:
        compile: compile the transformer blocks, see :func:`entrgi.denoisers.compilation.compile_blocks`.
    """

    compile: bool


class DenoiserOptions(OwnOptions, total=False):
    """What a denoiser is loaded with: where its files are and where its weights go, beside its own options.

    Attributes:
        dtype: of the weights; None keeps the checkpoint's.
        device: a name or an index; None is the CPU.
        adapter: a LoRA adapter (folder or hub id), or several: merged into the weights, in turn; needs ``peft``.
        revision, cache_dir, token, local_files_only: for the hub.
        subfolder: where in the folder or repository the checkpoint lies.
    """

    dtype: torch.dtype | str | None
    device: str | int | torch.device | None
    adapter: str | Path | Sequence[str | Path] | None
    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    local_files_only: bool
    subfolder: str


def take_own(options: Any) -> OwnOptions:
    """Those of ``options`` that are the class's, taken out of them."""
    own: Any = {name: options.pop(name) for name in OwnOptions.__annotations__ if name in options}
    return own


class BaseDenoiser:
    """A denoiser but for its logits. What runs is the twin of the user's model."""

    _twin: Any  # a Twin; of a CallableDenoiser also None

    def _settle(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        declared: Sequence[int],
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        chat: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Set what :class:`entrgi.denoisers.Denoiser` lists, from :class:`TokenOptions`.

        Args:
            declared: the ids that end a response, as the model's configs say.
        """
        check_tokenizer("denoiser", tokenizer)
        self.tokenizer, self.vocab_size, self.chat = tokenizer, vocab_size, chat
        self.max_length = check_max_length(max_length)
        self.mask_token_id = choose_mask_token_id(tokenizer, mask_token_id, vocab_size)
        self.template_options = check_template_options("denoiser", tokenizer, chat_template_kwargs)
        self.end_token_ids = choose_end_ids(
            eos_token_id, tokenizer, vocab_size, self.mask_token_id, declared, self.template_options
        )
        self.eos_token_id = next(iter(self.end_token_ids), None)
        self.pad_token_id = choose_id("pad_token_id", pad_token_id, named_id(tokenizer, "pad"), vocab_size)

    def encode(self, prompt: Prompt) -> Encoded:
        """See :class:`Denoiser`. Raises ValueError for messages where the tokenizer has no chat template."""
        encoded = encode_prompt(self.tokenizer, prompt, self.chat, self.template_options)
        return check_ids(self._framed(encoded), self._rows, self.tokenizer)

    def _framed(self, encoded: Encoded) -> Encoded:
        """``encoded`` with what the model expects around it."""
        return encoded

    @property
    def _rows(self) -> int:
        """How many ids the model reads."""
        return self.vocab_size

    @property
    def device(self) -> torch.device:
        """Of the user's model, as it is now."""
        return self._twin.source.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the user's model, as it is now."""
        return self._twin.source.dtype
