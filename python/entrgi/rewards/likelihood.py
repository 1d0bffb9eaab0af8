"""The log-likelihood of the response under an autoregressive language model."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.checkpoints import context_length, exact_attention, load_pretrained
from entrgi.models.wrapping import check_tokenizer, wrapped_layer
from entrgi.rewards.backbone import CausalBackbone
from entrgi.rewards.embedding import EmbeddingReward, twin_of
from entrgi.rewards.logsumexp import LogSumExp
from entrgi.rewards.options import OPTION_NAMES, ModelRewardOptions, split_options
from entrgi.rewards.own_score import check_own_score
from entrgi.rewards.reader import Reader
from entrgi.rewards.sequences import Places
from entrgi.rewards.tables import EmbeddingTable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from entrgi.rewards.options import LoadingArguments, ModelRewardArguments


class LogLikelihoodReward(EmbeddingReward):
    """log p(response | prompt) under a causal language model, as a mean over the response's tokens or a sum.

    With a chat template the prompt's messages are rendered up to the assistant's answer; without one, the response
    continues the plain text, or with ``include_prompt=False`` the begin-of-sequence token alone. The response's end
    (its first end-of-sequence token) is judged where it is visible. How it is computed: :class:`LikelihoodHead`.

    Args:
        model: the model, also inside ``PeftModel``, ``torch.compile`` or ``DistributedDataParallel``. It runs in
            evaluation mode and without gradients of its weights through a twin that shares them, and is not changed
            itself.
        tokenizer: its tokenizer.
        normalize: mean over the visible response tokens instead of the sum.
        options: fields of :class:`entrgi.rewards.options.ModelRewardOptions`: ``unmapped`` (for both embeddings),
            ``include_prompt``, ``max_length``, ``score_batch_size``, ``chat_template_kwargs``, ``reuse_prefix``,
            ``compile``.

    Raises:
        ValueError: for a model without ``inputs_embeds``, or whose logits are not its hidden states times its output
            embedding (a bias, a scale other than Gemma's soft cap), whose likelihoods over embeddings are others
            than over ids (see :mod:`entrgi.rewards.own_score`), or an option out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalize: bool = True,
        **options: Unpack[ModelRewardArguments],
    ) -> None:
        settings = ModelRewardOptions.of(type(self), options)
        twin = twin_of(model)
        check_tokenizer("reward", tokenizer)
        self.model = twin.module
        name, output, layer = type(self.model).__name__, output_layer(self.model), self.model.get_input_embeddings()
        settings = settings.within(context_length(exact_attention(self.model), tokenizer))
        table = EmbeddingTable(layer, layer)
        tied = table.layer is None and layer.weight.data_ptr() == output.weight.data_ptr()
        tables = [table] if tied else [table, EmbeddingTable(output)]
        reader = Reader(name, tokenizer, tables, settings, judges_response=True)
        head = LikelihoodHead(self.model, output, table.weight.shape[1], normalize)
        backbone = head.backbone
        self.reuse_prefix = settings.reuse_prefix and backbone.reuses_prefix
        super().__init__(reader, head, backbone=backbone if self.reuse_prefix else None, twin=twin)
        twin.watch(backbone.model, layer, output)
        head.check_logits(name, table)
        check_own_score(reader, head)
        if settings.compile:
            backbone.model.compile()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        normalize: bool = True,
        **options: Unpack[LoadingArguments],
    ) -> LogLikelihoodReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.models.checkpoints.load_pretrained`."""
        own, where = split_options(options)
        auto, known = AutoModelForCausalLM, (*signature(cls.from_pretrained).parameters, *OPTION_NAMES)
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, adapter=adapter, known=known, **where)
        return cls(model, tokenizer, normalize=normalize, **own)


class LikelihoodHead:
    """Mean or sum of the log-likelihoods of the visible response tokens.

    With hidden state h_{t-1} before the visible response position t, the output embedding O and the relaxed output
    embedding o_t = sum_i q_i O_i of that position, it is the mean (or sum) over t of
    ``h_{t-1} . o_t - logsumexp(O h_{t-1})``. With hard tokens that is the model's own log-likelihood, exactly. What
    is relaxed enters twice: as the token that is judged, and as input to all later hidden states.

    Args:
        output: the layer of O, [V, h].
        width: of the input embedding. A position holds that and beside it its row of O, or the one that is both.
        normalize: mean instead of the sum.
    """

    def __init__(self, model: PreTrainedModel, output: Any, width: int, normalize: bool) -> None:
        self.model, self.output, self.width, self.normalize = model, output, width, normalize
        self.backbone = CausalBackbone(model)
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        """Rewards [P], fp32 or fp64."""
        hidden = self.backbone.hidden(inputs_embeds[..., : self.width], visible, places, places.prefix)
        # Without a prefix, column 0 is no response position: none looks at the state that is missing there.
        before = hidden[:, :1] if places.prefix is None else places.prefix.last[places.prompt][:, None]
        previous = torch.cat([before, hidden[:, :-1]], dim=1)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        judged, output = visible & places.response, inputs_embeds[..., -previous.shape[2] :]
        logit = self.capped((previous.to(precise) * output.to(precise)).sum(dim=-1))
        value = logit - LogSumExp.apply(previous, self.output.weight, self.softcap)
        total = value.masked_fill(~judged, 0).sum(dim=1)
        return total / judged.sum(dim=1).clamp_min(1) if self.normalize else total

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def own_score(self, ids: Tensor, begin: int) -> Tensor:
        """See :class:`entrgi.rewards.own_score.ModelHead`."""
        logits = self.model(input_ids=ids, use_cache=False).logits
        likely = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)[0, :-1]
        judged = likely.gather(1, ids[0, 1:, None])[begin - 1 :]
        return (judged.mean(dim=0) if self.normalize and len(judged) else judged.sum(dim=0)).view(1)

    @torch.no_grad()
    def check_logits(self, name: str, table: EmbeddingTable) -> None:
        """Raise ValueError unless the model's logits are what this class takes them for."""
        weight = self.output.weight
        ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        hidden = self.backbone.hidden(table(ids), torch.ones_like(ids, dtype=torch.bool))
        ours = self.capped((hidden @ weight.T).float())
        if own.shape != ours.shape or (own - ours).abs().max() > 0.02 * own.abs().max():
            raise ValueError(
                f"reward: the logits of {name} are not its hidden states times its output embedding "
                "(it scales or shifts them), so a relaxed token has no log-likelihood"
            )


def output_layer(model: PreTrainedModel) -> Any:
    """The language-model head; ValueError where it is none that is a matrix alone."""
    head: Any = model.get_output_embeddings()
    if not isinstance(wrapped_layer(head), nn.Linear) or head.bias is not None:
        name = type(model).__name__
        raise ValueError(f"reward: {name} has no language-model head without a bias, expected a causal LM")
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"reward: an adapter changes the output layer of {type(model).__name__}, expected one that leaves it or "
            "saves it whole (modules_to_save): merge it first"
        )
    return head
