"""Sequence classifiers with one label: Skywork and other reward models, BERT-type classifiers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.checkpoints import context_length, exact_attention, load_pretrained
from entrgi.rewards.backbone import CausalBackbone
from entrgi.rewards.embedding import EmbeddingReward, EmbeddingTable, twin_of
from entrgi.rewards.masks import BIDIRECTIONAL_BY_LAYER, prepared_masks
from entrgi.rewards.prefix import Prefix
from entrgi.rewards.sequences import Frame, RewardSequences


class SequenceClassifierReward(EmbeddingReward):
    """An ``AutoModelForSequenceClassification`` with one label that takes ``inputs_embeds``.

    Causal models (Qwen3, Llama, Gemma, Mistral ...; they have a ``score`` head) are pooled at the last visible
    position, BERT-type models by their own head. With a chat template the response is the assistant's turn after the
    prompt's messages; without one the model reads ``[CLS] prompt response [SEP]``.

    Args:
        model: the model, also inside ``PeftModel``, ``torch.compile`` or ``DistributedDataParallel``. It runs in
            evaluation mode and without gradients of its weights through a twin that shares them, and is not changed
            itself.
        tokenizer: its tokenizer.
        missing: ``unk`` or ``zero``, see :func:`entrgi.vocabulary.align_embedding`.
        include_prompt: without a chat template, whether the text to score begins with the prompt; where the denoiser
            reads the prompt through a chat template of its own, the response is scored alone all the same.
        max_length: context in tokens; None takes what model and tokenizer declare.
        reuse_prefix: compute keys and values of what stands before the response once per generation (causal models
            whose masks can be prepared, see :mod:`entrgi.rewards.masks`). The same rewards and gradients to rounding.
        score_batch_size: texts per forward pass of :meth:`score`.
        compile: run the transformer through ``torch.compile``.

    Raises:
        ValueError: for a model with more than one label or without ``inputs_embeds``, or an option out of range.

    Example:
        >>> import torch, entrgi, entrgi.demo
        >>> from entrgi.prompts import Completion
        >>> reward = entrgi.SequenceClassifierReward(*entrgi.demo.load_reward(torch.float32))
        >>> text = "The movie was wonderful."
        >>> reward.score([Completion(prompt="The movie", text=text, response="was wonderful.")]).shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        reuse_prefix: bool = True,
        score_batch_size: int = 16,
        compile: bool = False,
    ) -> None:
        self.twin = twin_of(model)
        model = self.twin.module
        name = type(model).__name__
        if model.config.num_labels != 1:
            raise ValueError(f"reward: {name} has num_labels {model.config.num_labels}, expected 1")
        self.model = exact_attention(model)
        table = model.get_input_embeddings()
        super().__init__(
            name,
            tokenizer,
            [EmbeddingTable(table, table)],
            missing=missing,
            include_prompt=include_prompt,
            max_length=context_length(model, tokenizer) if max_length is None else max_length,
            score_batch_size=score_batch_size,
        )
        self.backbone = None
        if isinstance(getattr(model, "score", None), nn.Module):
            self.backbone = CausalBackbone(model, compile)
        else:
            self.masks = prepared_masks(model)
            if compile:
                model.base_model.compile()
        self.reuse_prefix = reuse_prefix and self.backbone is not None and self.backbone.reuses_prefix

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        adapter: str | Path | None = None,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        reuse_prefix: bool = True,
        score_batch_size: int = 16,
        compile: bool = False,
        **options: object,
    ) -> SequenceClassifierReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.checkpoints.load_pretrained`."""
        auto, known = AutoModelForSequenceClassification, signature(cls.from_pretrained).parameters
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, adapter=adapter, known=known, **options)
        return cls(
            model,
            tokenizer,
            missing=missing,
            include_prompt=include_prompt,
            max_length=max_length,
            reuse_prefix=reuse_prefix,
            score_batch_size=score_batch_size,
            compile=compile,
        )

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """See :meth:`EmbeddingReward.relaxed`; differentiable in ``inputs_embeds``."""
        if self.backbone is not None:
            return self._score_last(self.backbone.hidden(inputs_embeds, attention_mask), attention_mask)
        if self.masks is None:
            return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask.long()).logits[:, 0]
        index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(attention_mask.shape)
        masks = self.masks(attention_mask, index, index, inputs_embeds.dtype)
        if self.model.config.model_type in BIDIRECTIONAL_BY_LAYER:
            return self._pool_modernbert(inputs_embeds, masks, attention_mask)
        return self.model(inputs_embeds=inputs_embeds, attention_mask=masks).logits[:, 0]

    def _reader(self, frames: list[Frame]) -> tuple[list[Frame], Callable[[Tensor, Tensor, RewardSequences], Tensor]]:
        lengths = [len(frame.prefix) for frame in frames]
        if not self.reuse_prefix or not any(lengths):
            return frames, self._read
        prefix = self.backbone.prefix(
            self._padded([frame.prefix or [0] for frame in frames])[0], torch.tensor(lengths, device=self.device)
        )
        rest = [Frame([], frame.suffix, kept=len(frame.prefix), keeps_first=frame.keeps_first) for frame in frames]
        return rest, partial(self._read_after, prefix)

    def _read(self, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        if self.backbone is None:
            return self.relaxed(inputs_embeds, visible)
        return self._score_last(self.backbone.hidden(inputs_embeds, visible, sequences), visible)

    def _read_after(self, prefix: Prefix, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        hidden = self.backbone.hidden(inputs_embeds, visible, sequences, prefix)
        return self._score_last(hidden, visible, prefix.last[sequences.prompt])

    def _score_last(self, hidden: Tensor, visible: Tensor, before: Tensor | None = None) -> Tensor:
        """The head at each row's last visible position; ``before`` [P, h] is what precedes the first column."""
        index = torch.arange(visible.shape[1], device=visible.device)
        last = hidden[torch.arange(visible.shape[0], device=visible.device), (visible * index).amax(dim=1)]
        if before is not None:  # everything after the prefix may be hidden
            last = torch.where(visible.any(dim=1, keepdim=True), last, before)
        return self.model.score(last)[:, 0]

    def _pool_modernbert(self, inputs_embeds: Tensor, masks: dict[str, Tensor], visible: Tensor) -> Tensor:
        """The classifier's own steps: its forward takes one mask for two purposes, and pooling needs the flat one."""
        hidden = self.model.model(inputs_embeds=inputs_embeds, attention_mask=masks).last_hidden_state
        if self.model.config.classifier_pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * visible[..., None]).sum(dim=1) / visible.sum(dim=1, keepdim=True)
        return self.model.classifier(self.model.head(pooled))[:, 0]
