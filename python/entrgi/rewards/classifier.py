"""One label of a sequence classifier: Skywork and other reward models, BERT-type classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.checkpoints import context_length, exact_attention, load_pretrained
from entrgi.models.wrapping import check_tokenizer
from entrgi.prompts import Completion
from entrgi.rewards.backbone import CausalBackbone
from entrgi.rewards.embedding import EmbeddingReward, EmbeddingTable, input_layer, scales_by_share, twin_of
from entrgi.rewards.masks import BIDIRECTIONAL_BY_LAYER, CAUSAL_WITH_HEAD, prepared_masks
from entrgi.rewards.own_score import check_own_score
from entrgi.rewards.prefix import Prefix
from entrgi.rewards.sequences import Frame, RewardSequences
from entrgi.vocabulary import Alignment


class SequenceClassifierReward(EmbeddingReward):
    """The logit of one label of an ``AutoModelForSequenceClassification`` that takes ``inputs_embeds``.

    Causal models (Qwen3, Llama, Gemma, Mistral ...; they have a ``score`` head) are pooled at the last visible
    position, BERT-type models by their own head. Padding ids that a template ends in are not read, since the models
    pool before them. With a chat template the response is the assistant's turn after the
    prompt's messages; without one the model reads ``[CLS] prompt response [SEP]``.

    Args:
        model: the model, also inside ``PeftModel``, ``torch.compile`` or ``DistributedDataParallel``. It runs in
            evaluation mode and without gradients of its weights through a twin that shares them, and is not changed
            itself.
        tokenizer: its tokenizer.
        label: which of several labels, by its name in ``id2label`` or its index. The reward is the label's raw logit,
            not its probability.
        missing: ``unk`` or ``zero``, see :func:`entrgi.vocabulary.align_embedding`.
        include_prompt: without a chat template, whether the text to score begins with the prompt; where the denoiser
            reads the prompt through a chat template of its own, the response is scored alone all the same.
        max_length: context in tokens; None takes what model and tokenizer declare.
        reuse_prefix: compute keys and values of what stands before the response once per generation (causal models
            whose masks can be prepared, see :mod:`entrgi.rewards.masks`). The same rewards and gradients to rounding.
        score_batch_size: texts per forward pass of :meth:`score`.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        compile: run the transformer through ``torch.compile``.

    Raises:
        ValueError: for a model with several labels and no ``label``, without ``inputs_embeds``, or whose scores over
            embeddings are others than over ids (see :mod:`entrgi.rewards.own_score`), or an option out of range.

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
        label: int | str | None = None,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        reuse_prefix: bool = True,
        score_batch_size: int = 16,
        chat_template_kwargs: Mapping[str, object] | None = None,
        compile: bool = False,
    ) -> None:
        self.twin = twin_of(model)
        check_tokenizer("reward", tokenizer)
        model = self.twin.module
        name = type(model).__name__
        self.label = choose_label(model, label)
        self.model = exact_attention(model)
        table = model.get_input_embeddings()
        super().__init__(
            name,
            tokenizer,
            [EmbeddingTable(table, input_layer(model))],
            missing=missing,
            include_prompt=include_prompt,
            max_length=context_length(model, tokenizer) if max_length is None else max_length,
            score_batch_size=score_batch_size,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.backbone, self.pooled_before, self.masks = None, None, None
        if isinstance(getattr(model, "score", None), nn.Module) or model.config.model_type in CAUSAL_WITH_HEAD:
            self.backbone, self.pooled_before = CausalBackbone(model), model.config.get_text_config().pad_token_id
        else:
            self.masks = prepared_masks(model)
        self.twin.watch(model.base_model if self.backbone is None else self.backbone.model, table)
        check_own_score(self, self.probes(), self._own_score)
        if compile:
            (model.base_model if self.backbone is None else self.backbone.model).compile()
        self.reuse_prefix = reuse_prefix and self.backbone is not None and self.backbone.reuses_prefix

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        label: int | str | None = None,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        reuse_prefix: bool = True,
        score_batch_size: int = 16,
        chat_template_kwargs: Mapping[str, object] | None = None,
        compile: bool = False,
        **options: object,
    ) -> SequenceClassifierReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.models.checkpoints.load_pretrained`."""
        auto, known = AutoModelForSequenceClassification, signature(cls.from_pretrained).parameters
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, adapter=adapter, known=known, **options)
        return cls(
            model,
            tokenizer,
            label=label,
            missing=missing,
            include_prompt=include_prompt,
            max_length=max_length,
            reuse_prefix=reuse_prefix,
            score_batch_size=score_batch_size,
            chat_template_kwargs=chat_template_kwargs,
            compile=compile,
        )

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """See :meth:`EmbeddingReward.relaxed`; differentiable in ``inputs_embeds``."""
        if self.backbone is not None:
            return self._score_last(self.backbone.hidden(inputs_embeds, attention_mask), attention_mask)
        if self.masks is None:
            return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask.long()).logits[:, self.label]
        index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(attention_mask.shape)
        masks = self.masks(attention_mask, index, index, inputs_embeds.dtype)
        if self.model.config.model_type in BIDIRECTIONAL_BY_LAYER:
            return self._pool_modernbert(inputs_embeds, masks, attention_mask)
        return self.model(inputs_embeds=inputs_embeds, attention_mask=masks).logits[:, self.label]

    def _reader(self, frames: list[Frame]) -> tuple[list[Frame], Callable[[Tensor, Tensor, RewardSequences], Tensor]]:
        lengths = [len(frame.prefix) for frame in frames]
        if not self.reuse_prefix or not any(lengths):
            return frames, self._read
        prefix = self.backbone.prefix(
            self.padded([frame.prefix or [0] for frame in frames])[0], torch.tensor(lengths, device=self.device)
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

    def known(self, ids: list[int]) -> list[int]:
        """See :meth:`EmbeddingReward.known`. Raises ValueError for a token by whose share the model scales, too."""
        if scales_by_share(self.model) and self.model.config.mask_token_id in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.model.config.mask_token_id)
            raise ValueError(
                f"reward: {self.name} scales all embeddings by the share of {token!r}, expected none of it"
            )
        return super().known(ids)

    def _frame(self, prefix: list[int], suffix: list[int]) -> Frame:
        return super()._frame(prefix, self._unpadded(suffix))

    def _unread(self, ends: tuple[int, ...], alignment: Alignment) -> tuple[int, ...]:
        """The ends of a response that the model takes for padding: a decoded text is scored without them, too."""
        if self.pooled_before is None:
            return ()
        return tuple(end for end in ends if int(alignment.ids[end]) == self.pooled_before)

    def _encoded(self, completion: Completion) -> tuple[list[int], int, int]:
        ids, begin, end = super()._encoded(completion)
        read = self._unpadded(ids) or ids[:1]
        return read, begin, max(0, end - len(ids) + len(read))

    def _unpadded(self, ids: list[int]) -> list[int]:
        """``ids`` up to the last one that a causal model takes for text."""
        length = len(ids)
        while self.pooled_before is not None and length > 0 and ids[length - 1] == self.pooled_before:
            length -= 1
        return ids[:length]

    def _own_score(self, row: tuple[list[int], int]) -> Tensor:
        """The model's own score [1] of a row of :meth:`score_rows`, over ids."""
        ids = torch.tensor([row[0]], device=self.device)
        options = {} if self.backbone is None else {"use_cache": False}
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[:, self.label]

    def _score_last(self, hidden: Tensor, visible: Tensor, before: Tensor | None = None) -> Tensor:
        """The head at each row's last visible position; ``before`` [P, h] is what precedes the first column."""
        index = torch.arange(visible.shape[1], device=visible.device)
        last = hidden[torch.arange(visible.shape[0], device=visible.device), (visible * index).amax(dim=1)]
        if before is not None:  # everything after the prefix may be hidden
            last = torch.where(visible.any(dim=1, keepdim=True), last, before)
        if self.model.config.model_type in CAUSAL_WITH_HEAD:
            return self.model.classifier(self.model.head(last))[:, self.label]
        return self.model.score(last)[:, self.label]

    def _pool_modernbert(self, inputs_embeds: Tensor, masks: dict[str, Tensor], visible: Tensor) -> Tensor:
        """The classifier's own steps: its forward takes one mask for two purposes, and pooling needs the flat one."""
        hidden = self.model.model(inputs_embeds=inputs_embeds, attention_mask=masks).last_hidden_state
        if self.model.config.classifier_pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * visible[..., None]).sum(dim=1) / visible.sum(dim=1, keepdim=True)
        return self.model.classifier(self.model.head(pooled))[:, self.label]


def choose_label(model: PreTrainedModel, label: int | str | None) -> int:
    """The index of ``label`` among the model's labels. Raises ValueError where it is none, or not given."""
    config = model.config
    count, names = config.num_labels, config.id2label
    if label is None and count == 1:
        return 0
    if isinstance(label, Integral) and not isinstance(label, bool) and 0 <= label < count:
        return int(label)
    named = [index for index, name in names.items() if name == label]
    if isinstance(label, str) and len(named) == 1 and 0 <= named[0] < count:
        return named[0]
    shown = ", ".join(f"{index} {name!r}" for index, name in list(names.items())[:10])
    got = "" if label is None else f", got {label!r:.80}"
    raise ValueError(
        f"reward: {type(model).__name__} has {count} labels ({shown}{', ...' if count > 10 else ''}), "
        f"expected label= the index or the name of one{got}"
    )
