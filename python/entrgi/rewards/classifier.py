"""One label of a sequence classifier: Skywork and other reward models, BERT-type classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.attention import keep_masks_on_device
from entrgi.models.checkpoints import context_length, exact_attention, load_pretrained
from entrgi.models.fields import is_number
from entrgi.models.wrapping import check_tokenizer
from entrgi.rewards.backbone import CausalBackbone
from entrgi.rewards.embedding import EmbeddingReward, twin_of
from entrgi.rewards.options import OPTION_NAMES, ModelRewardOptions, split_options
from entrgi.rewards.own_score import check_own_score
from entrgi.rewards.reader import Reader
from entrgi.rewards.sequences import Places
from entrgi.rewards.tables import input_table, scales_by_share

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from entrgi.rewards.options import LoadingArguments, ModelRewardArguments


# Causal classifiers whose head is more than a matrix (``score``).
_CAUSAL_WITH_HEAD = {"modernbert-decoder"}


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
        options: fields of :class:`entrgi.rewards.options.ModelRewardOptions`: ``unmapped``, ``include_prompt``,
            ``max_length``, ``score_batch_size``, ``chat_template_kwargs``, ``reuse_prefix``, ``compile``.

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
        **options: Unpack[ModelRewardArguments],
    ) -> None:
        settings = ModelRewardOptions.of(type(self), options)
        twin = twin_of(model)
        check_tokenizer("reward", tokenizer)
        self.model, self.label = twin.module, choose_label(twin.module, label)
        settings = settings.within(context_length(exact_attention(self.model), tokenizer))
        name, config, table = type(self.model).__name__, self.model.config, input_table(self.model)
        if isinstance(getattr(self.model, "score", None), nn.Module) or config.model_type in _CAUSAL_WITH_HEAD:
            head = CausalClassifierHead(self.model, self.label)
            body, backbone, padding_id = head.backbone.model, head.backbone, config.get_text_config().pad_token_id
        else:
            head = EncoderClassifierHead(self.model, self.label)
            body, backbone, padding_id = self.model.base_model, None, None
        refused = {config.mask_token_id: "scales all embeddings by the share of"} if scales_by_share(self.model) else {}
        reader = Reader(name, tokenizer, [table], settings, padding_id=padding_id, refused=refused)
        self.reuse_prefix = settings.reuse_prefix and backbone is not None and backbone.reuses_prefix
        super().__init__(reader, head, backbone=backbone if self.reuse_prefix else None, twin=twin)
        twin.watch(body, table.rows)
        check_own_score(reader, head)
        if settings.compile:
            body.compile()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        label: int | str | None = None,
        **options: Unpack[LoadingArguments],
    ) -> SequenceClassifierReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.models.checkpoints.load_pretrained`."""
        own, where = split_options(options)
        auto, known = AutoModelForSequenceClassification, (*signature(cls.from_pretrained).parameters, *OPTION_NAMES)
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, adapter=adapter, known=known, **where)
        return cls(model, tokenizer, label=label, **own)


class CausalClassifierHead:
    """The logit of a label at the last visible position."""

    model: Any  # its head goes by one of several names

    def __init__(self, model: PreTrainedModel, label: int) -> None:
        self.model, self.label, self.backbone = model, label, CausalBackbone(model)

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        hidden = self.backbone.hidden(inputs_embeds, visible, places, places.prefix)
        index = torch.arange(visible.shape[1], device=visible.device)
        last = hidden[torch.arange(visible.shape[0], device=visible.device), (visible * index).amax(dim=1)]
        if places.prefix is not None:  # everything after the prefix may be hidden
            last = torch.where(visible.any(dim=1, keepdim=True), last, places.prefix.last[places.prompt])
        if self.model.config.model_type in _CAUSAL_WITH_HEAD:
            return self.model.classifier(self.model.head(last))[:, self.label]
        return self.model.score(last)[:, self.label]

    def own_score(self, ids: Tensor, begin: int) -> Tensor:
        """See :class:`entrgi.rewards.own_score.ModelHead`."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, self.label]


class EncoderClassifierHead:
    """The logit of a label by the model's own pooling."""

    def __init__(self, model: PreTrainedModel, label: int) -> None:
        self.model, self.label = model, label
        keep_masks_on_device(model)

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        return self.model(inputs_embeds=inputs_embeds, attention_mask=visible.long()).logits[:, self.label]

    def own_score(self, ids: Tensor, begin: int) -> Tensor:
        """See :class:`entrgi.rewards.own_score.ModelHead`."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, self.label]


def choose_label(model: PreTrainedModel, label: int | str | None) -> int:
    """The index of ``label`` among the model's labels. Raises ValueError where it is none, or not given."""
    config: Any = model.config
    count, names = config.num_labels, config.id2label
    index: Any = label
    if label is None and count == 1:
        return 0
    if is_number(index, Integral) and 0 <= index < count:
        return int(index)
    named = [index for index, name in names.items() if name == label]
    if isinstance(label, str) and len(named) == 1 and 0 <= named[0] < count:
        return named[0]
    shown = ", ".join(f"{index} {name!r}" for index, name in list(names.items())[:10])
    got = "" if label is None else f", got {label!r:.80}"
    raise ValueError(
        f"reward: {type(model).__name__} has {count} labels ({shown}{', ...' if count > 10 else ''}), "
        f"expected label= the index or the name of one{got}"
    )
