"""The log-likelihood of the response under an autoregressive language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.checkpoints import context_length, exact_attention, load_pretrained
from entrgi.models.wrapping import check_tokenizer, wrapped_layer
from entrgi.prompts import Completion
from entrgi.rewards.backbone import CausalBackbone
from entrgi.rewards.embedding import EmbeddingReward, EmbeddingTable, twin_of
from entrgi.rewards.own_score import check_own_score
from entrgi.rewards.prefix import Prefix
from entrgi.rewards.sequences import Frame, RewardSequences

# Logits that exist at once in logsumexp: 2^26 in fp32 are 256 MiB.
_CHUNK = 2**26


class LogLikelihoodReward(EmbeddingReward):
    """log p(response | prompt) under a causal language model, as a mean over the response's tokens or a sum.

    With hidden state h_{t-1} before the visible response position t, the output embedding O and the relaxed output
    embedding o_t = sum_i q_i O_i of that position, the reward is the mean (or sum) over t of
    ``h_{t-1} . o_t - logsumexp(O h_{t-1})``. With hard tokens that is the model's own log-likelihood, exactly. What
    is relaxed enters twice: as the token that is judged, and as input to all later hidden states.

    With a chat template the prompt's messages are rendered up to the assistant's answer; without one, the response
    continues the plain text. The response's end (its first end-of-sequence token) is judged where it is visible.

    Args:
        model: the model, also inside ``PeftModel``, ``torch.compile`` or ``DistributedDataParallel``. It runs in
            evaluation mode and without gradients of its weights through a twin that shares them, and is not changed
            itself.
        tokenizer: its tokenizer.
        normalize: mean over the visible response tokens instead of the sum.
        missing: ``unk`` or ``zero``, see :func:`entrgi.vocabulary.align_embedding`; for both embeddings.
        include_prompt: without a chat template, whether the response is judged after the prompt, or alone after the
            begin-of-sequence token.
        max_length: context in tokens; None takes what model and tokenizer declare.
        reuse_prefix: compute the prompt's keys and values once per generation.
        score_batch_size: texts per forward pass of :meth:`score`.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        compile: run the transformer through ``torch.compile``.

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
        head = model.get_output_embeddings()
        if not isinstance(wrapped_layer(head), nn.Linear) or head.bias is not None:
            raise ValueError(f"reward: {name} has no language-model head without a bias, expected a causal LM")
        if hasattr(head, "base_layer"):
            raise ValueError(
                f"reward: an adapter changes the output layer of {name}, expected one that leaves it or saves it whole "
                "(modules_to_save): merge it first"
            )
        self.model, self.normalize, self.head = exact_attention(model), normalize, head
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        layer = model.get_input_embeddings()
        table = EmbeddingTable(layer, layer)
        self.tied = table.layer is None and layer.weight.data_ptr() == head.weight.data_ptr()
        super().__init__(
            name,
            tokenizer,
            [table] if self.tied else [table, EmbeddingTable(head)],
            missing=missing,
            include_prompt=include_prompt,
            max_length=context_length(model, tokenizer) if max_length is None else max_length,
            score_batch_size=score_batch_size,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.backbone = CausalBackbone(model)
        self.twin.watch(self.backbone.model, layer, head)
        self._check_logits()
        check_own_score(self, self.probes(), self._own_score)
        if compile:
            self.backbone.model.compile()
        self.reuse_prefix = reuse_prefix and self.backbone.reuses_prefix

    @property
    def output(self) -> Tensor:
        """O, [V, h]."""
        return self.head.weight

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        normalize: bool = True,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        reuse_prefix: bool = True,
        score_batch_size: int = 16,
        chat_template_kwargs: Mapping[str, object] | None = None,
        compile: bool = False,
        **options: object,
    ) -> LogLikelihoodReward:
        """Load a checkpoint folder or hub id; see :func:`entrgi.models.checkpoints.load_pretrained`."""
        auto, known = AutoModelForCausalLM, signature(cls.from_pretrained).parameters
        model, tokenizer = load_pretrained("reward", name, auto, dtype, device, adapter=adapter, known=known, **options)
        return cls(
            model,
            tokenizer,
            normalize=normalize,
            missing=missing,
            include_prompt=include_prompt,
            max_length=max_length,
            reuse_prefix=reuse_prefix,
            score_batch_size=score_batch_size,
            chat_template_kwargs=chat_template_kwargs,
            compile=compile,
        )

    def _frame(self, prefix: list[int], suffix: list[int]) -> Frame:
        """The response's frame. What follows a response has no part in its likelihood."""
        self.format.for_empty()
        return Frame(self.known(self._begun(prefix)), [], keeps_first=True)

    def _begun(self, prefix: list[int]) -> list[int]:
        """``prefix``, never empty: the first response token needs something that predicts it."""
        if prefix:
            return prefix
        if self.tokenizer.bos_token_id is None:
            raise ValueError(
                f"reward: nothing stands before the response for {self.name} to predict its first token from "
                "(no chat template, no prompt text, and its tokenizer has no begin-of-sequence token)"
            )
        return [self.tokenizer.bos_token_id]

    def _reader(self, frames: list[Frame]) -> tuple[list[Frame], Callable[[Tensor, Tensor, RewardSequences], Tensor]]:
        if not self.reuse_prefix:
            return frames, self._read
        width = self.tables[0].weight.shape[1]
        embeds = self.padded([frame.prefix for frame in frames])[0][..., :width]
        lengths = torch.tensor([len(frame.prefix) for frame in frames], device=self.device)
        prefix = self.backbone.prefix(embeds.contiguous(), lengths)
        rest = [Frame([], [], kept=len(frame.prefix), keeps_first=True) for frame in frames]
        return rest, partial(self._read_after, prefix)

    def _read(self, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        hidden = self.backbone.hidden(self._inputs(inputs_embeds), visible, sequences)
        # Column 0 holds a prefix token: no response position looks at the state that is missing there.
        return self._likelihood(hidden[:, :1], hidden, inputs_embeds, visible & sequences.response)

    def _read_after(self, prefix: Prefix, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        hidden = self.backbone.hidden(self._inputs(inputs_embeds), visible, sequences, prefix)
        before = prefix.last[sequences.prompt][:, None]
        return self._likelihood(before, hidden, inputs_embeds, visible & sequences.response)

    def _inputs(self, inputs_embeds: Tensor) -> Tensor:
        return inputs_embeds if self.tied else inputs_embeds[..., : self.tables[0].weight.shape[1]]

    def _likelihood(self, before: Tensor, hidden: Tensor, inputs_embeds: Tensor, judged: Tensor) -> Tensor:
        """Mean or sum over the positions in ``judged`` (bool [P, S]), [P], fp32 or fp64.

        Args:
            before: [P, 1, h], the hidden state before column 0.
            hidden: [P, S, h].
            inputs_embeds: [P, S, d], with the output embedding in its last h columns.
        """
        previous = torch.cat([before, hidden[:, :-1]], dim=1)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        output = inputs_embeds[..., -previous.shape[2] :]
        logit = self._capped((previous.to(precise) * output.to(precise)).sum(dim=-1))
        value = logit - LogSumExp.apply(previous, self.output, self.softcap)
        total = value.masked_fill(~judged, 0).sum(dim=1)
        return total / judged.sum(dim=1).clamp_min(1) if self.normalize else total

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _encoded(self, completion: Completion) -> tuple[list[int], int, int]:
        before, response = self.format.split(completion)
        before = self._begun(before)
        return before + response, len(before), 0

    def score_padded(self, inputs_embeds: Tensor, valid: Tensor, begins: Sequence[int]) -> Tensor:
        """See :meth:`EmbeddingReward.score_padded`."""
        start = torch.tensor(begins, device=self.device)[:, None]
        judged = valid & (torch.arange(valid.shape[1], device=self.device) >= start)
        hidden = self.backbone.hidden(self._inputs(inputs_embeds), valid)
        return self._likelihood(hidden[:, :1], hidden, inputs_embeds, judged)

    def _own_score(self, row: tuple[list[int], int]) -> Tensor:
        """The model's own likelihood [1] of a row of :meth:`score_rows`, over ids."""
        ids = torch.tensor([row[0]], device=self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        likely = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)[0, :-1]
        judged = likely.gather(1, ids[0, 1:, None])[row[1] - 1 :]
        return (judged.mean(dim=0) if self.normalize and len(judged) else judged.sum(dim=0)).view(1)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raise ValueError unless the model's logits are what this class takes them for."""
        ids = torch.arange(min(4, self.output.shape[0]), device=self.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        embeds = self.tables[0](ids)
        hidden = self.backbone.hidden(embeds, torch.ones_like(ids, dtype=torch.bool))
        ours = self._capped((hidden @ self.output.T).float())
        if own.shape != ours.shape or (own - ours).abs().max() > 0.02 * own.abs().max():
            raise ValueError(
                f"reward: the logits of {self.name} are not its hidden states times its output embedding "
                "(it scales or shifts them), so a relaxed token has no log-likelihood"
            )


class LogSumExp(torch.autograd.Function):
    """logsumexp over ids of ``cap(hidden @ weight.T)``, [...] of hidden [..., h], without keeping the logits.

    The gradient, softmax(logits) @ weight (times cap' where there is a soft cap), is computed on the way forward,
    while a chunk's logits exist: [.., h] is kept instead of [.., V].
    """

    @staticmethod
    def forward(ctx: object, hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        values, gradients = [], []
        for chunk in flat.split(max(1, _CHUNK // weight.shape[0])):
            logits = (chunk @ weight.T).to(precise)
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits, slope = softcap * bent, 1 - bent * bent
            value = logits.logsumexp(dim=-1)
            values.append(value)
            if ctx.needs_input_grad[0]:
                share = (logits - value[:, None]).exp_()
                share = share if slope is None else share * slope
                gradients.append(share.to(weight.dtype) @ weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).view(hidden.shape))
        return torch.cat(values).view(hidden.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient[..., None] * slope).to(slope.dtype), None, None
