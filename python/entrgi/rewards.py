"""Reward models: relaxed embeddings in for guidance, decoded text in for the final score."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.checkpoints import context_length, freeze, load_pretrained
from entrgi.prompts import Prompt, check_prompt, plain_ids, render_chat


class Reward(Protocol):
    """What the sampler needs of a reward model.

    Attributes:
        tokenizer: its tokenizer.
        weight: [V_reward, d], its input embedding.
        missing: what the reward reads for ids without a token; see :func:`entrgi.vocabulary.align_embedding`.
        max_length: context in tokens, or None.
        reads_prompt: it scores prompt and response as one plain text (no chat template).
    """

    tokenizer: PreTrainedTokenizerBase
    weight: Tensor
    missing: str
    max_length: int | None
    reads_prompt: bool

    def frame(self, prompt: Prompt, text_ids: list[int]) -> tuple[list[int], list[int]]:
        """Ids before and after the response; ``text_ids`` is what comes before it in a plain text."""
        ...

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [P] of [P, S, d], differentiable; ``attention_mask`` is bool [P, S]."""
        ...

    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Rewards of decoded texts, fp32 [n] on the CPU."""
        ...


class SequenceClassifierReward:
    """An ``AutoModelForSequenceClassification`` with one label that takes ``inputs_embeds``.

    Causal models (Qwen3, Llama ...; they have a ``score`` head) are pooled at the last real position,
    BERT-type models by their own head. With a chat template the response is the assistant's turn after the
    prompt's messages; without one the model reads ``[CLS] prompt response [SEP]``.

    Args:
        model: the model; it is put into evaluation mode and its parameters are frozen.
        tokenizer: its tokenizer.
        missing: ``unk`` or ``zero``, see :func:`entrgi.vocabulary.align_embedding`.
        include_prompt: without a chat template, whether the text to score begins with the prompt.
        max_length: context in tokens; None takes what model and tokenizer declare.

    Raises:
        ValueError: for a model with more than one label, without ``inputs_embeds``, or whose input embedding is
            more than a table (scaled, as in Gemma 3).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
    ) -> None:
        name = type(model).__name__
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"reward: {name} does not take inputs_embeds, so no gradient can reach its input")
        if model.config.num_labels != 1:
            raise ValueError(f"reward: {name} has num_labels {model.config.num_labels}, expected 1")
        self.model, self.tokenizer, self.missing = freeze(model), tokenizer, missing
        table = model.get_input_embeddings()
        self.weight = table.weight
        probe = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)
        if not torch.equal(table(probe), self.weight[probe]):
            raise ValueError(f"reward: {name} changes (scales) its embedding's rows, expected them as they are")
        self.chat = tokenizer.chat_template is not None
        self.reads_prompt = include_prompt and not self.chat
        self.causal = isinstance(getattr(model, "score", None), nn.Module)
        self.max_length = max_length or context_length(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        **options: object,
    ) -> SequenceClassifierReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.checkpoints.load_pretrained`."""
        auto = AutoModelForSequenceClassification
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, **options)
        return cls(model, tokenizer, missing=missing, include_prompt=include_prompt, max_length=max_length)

    def frame(self, prompt: Prompt, text_ids: list[int]) -> tuple[list[int], list[int]]:
        """See :class:`Reward`. Raises ValueError for messages that cannot be rendered."""
        if self.chat:
            # The response's place is found by a marker that no prompt can hold, not by a fixed placeholder.
            marker = uuid4().hex
            before, found, after = render_chat(self.tokenizer, prompt, marker).rpartition(marker)
            if not found or marker in before:
                raise ValueError("reward: its chat template does not show the assistant's turn exactly once")
            return plain_ids(self.tokenizer, before), plain_ids(self.tokenizer, after)
        check_prompt(prompt)
        start, end = self._special_ids()
        return start + (text_ids if self.reads_prompt else []), end

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [P] of input embeddings [P, S, d]; see :class:`Reward`.

        Position ids are the plain indices, whatever is masked.
        """
        count, width, _ = inputs_embeds.shape
        if not self.causal:
            return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask.long()).logits[:, 0]
        index = torch.arange(width, device=inputs_embeds.device)
        hidden = self.model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._causal_mask(attention_mask, index, inputs_embeds.dtype),
            position_ids=index[None],
            use_cache=False,
        ).last_hidden_state
        last = (attention_mask * index).amax(dim=1)
        return self.model.score(hidden[torch.arange(count, device=hidden.device), last])[:, 0]

    @torch.no_grad()
    def score(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        """Rewards of decoded texts, fp32 [n]; with a chat template each is the answer to its prompt.

        A text that exceeds the context is cut there, with a warning.
        """
        start, end = self._special_ids()
        rows = []
        for text, prompt in zip(texts, prompts, strict=True):
            if self.chat:
                rows.append(plain_ids(self.tokenizer, render_chat(self.tokenizer, prompt, text)))
            else:
                rows.append([*start, *plain_ids(self.tokenizer, text), *end])
            if self.max_length is not None and len(rows[-1]) > self.max_length:
                warnings.warn(f"text of {len(rows[-1])} tokens cut to the reward's {self.max_length}", stacklevel=2)
                del rows[-1][self.max_length - len(end) : len(rows[-1]) - len(end)]
        width = max(map(len, rows), default=1)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        device = self.weight.device
        return self.relaxed(self.weight[ids.to(device)], mask.to(device)).float().cpu()

    def _special_ids(self) -> tuple[list[int], list[int]]:
        if self.chat:
            return [], []
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if start is None and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id]:
            start = self.tokenizer.bos_token_id  # Llama-type tokenizers that begin every text with it
        return [] if start is None else [start], [] if end is None else [end]

    def _causal_mask(self, attention_mask: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        if getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds):
            return attention_mask.long()  # sliding windows: the model builds its masks from two dimensions
        # Four dimensions, prepared: the model would look at a two-dimensional mask on the host.
        visible = attention_mask[:, None, None, :] & (index <= index[:, None])
        return torch.zeros(visible.shape, dtype=dtype, device=index.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )


def attention_mask(
    tokens: Tensor, valid: Tensor, response: Tensor, eos_token_id: int | None, pad_token_id: int | None
) -> Tensor:
    """What the reward model attends to, bool [P, S]: real positions but the response's end.

    Masked are response positions after the first end-of-sequence token, and those that hold the padding
    token. Where the two are one id (Dream), the first one is masked too, as published.

    Args:
        tokens: int64 [P, S], committed ids, argmax z at masked positions.
        valid: bool [P, S], real positions.
        response: bool [P, S], positions of the response.
    """
    hidden = torch.zeros_like(valid)
    if eos_token_id is not None:
        is_eos = (response & (tokens == eos_token_id)).long()
        hidden = is_eos.cumsum(dim=1) > is_eos  # an earlier one exists
    if pad_token_id is not None:
        hidden = hidden | (tokens == pad_token_id)
    return valid & ~(hidden & response)
