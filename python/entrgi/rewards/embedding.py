"""What all rewards that read input embeddings share: options, vocabulary, layout, and scores in chunks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.wrapping import Twin, refuse_inference_weights, unwrap
from entrgi.prompts import Completion, plain_ids
from entrgi.rewards.masks import attention_mask
from entrgi.rewards.sequences import Frame, RewardSequences, build_reward_sequences
from entrgi.rewards.text import TextFormat
from entrgi.sequences import Layout
from entrgi.vocabulary import Alignment, align, align_embedding

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser


class EmbeddingTable:
    """Input embeddings by id: a matrix, or a layer that does more than look up its rows.

    Gemma scales the rows of its embedding inside that layer (in transformers 5; inside the model before), so
    what the model is to be fed is the layer's output.

    Args:
        rows: [V, d], or the module that has them as its ``weight``, which is asked for it every time.
        layer: the layer that looks them up; None: the rows are used as they are.
    """

    def __init__(self, rows: Tensor | nn.Module, layer: nn.Module | None = None) -> None:
        self.rows, self.layer = rows, layer
        if isinstance(layer, nn.Embedding):  # an adapter's layer is none of these
            probe = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)
            if torch.equal(layer(probe), self.weight[probe]):
                self.layer = None

    @property
    def weight(self) -> Tensor:
        """[V, d]."""
        return self.rows if isinstance(self.rows, Tensor) else self.rows.weight

    def __call__(self, ids: Tensor) -> Tensor:
        """Embeddings [..., d] of ``ids`` int64 [...]."""
        return self.weight[ids] if self.layer is None else self.layer(ids)

    def full(self) -> Tensor:
        """Embeddings [V, d] of all ids; the matrix itself where the rows are used as they are."""
        if self.layer is None:
            return self.weight
        return self.layer(torch.arange(self.weight.shape[0], device=self.weight.device))


@dataclass(frozen=True)
class BoundEmbeddingReward:
    """See :class:`entrgi.rewards.BoundReward`.

    Attributes:
        embedding: [V, d], by the denoiser's ids.
        sequences: the trajectories as the reward reads them.
        eos_token_id, pad_token_id: the denoiser's; they end and hide positions of a response.
        read: (inputs_embeds [A, S, d], visible bool [A, S], sequences) -> rewards [A].
    """

    embedding: Tensor
    sequences: RewardSequences
    eos_token_id: int | None
    pad_token_id: int | None
    read: Callable[[Tensor, Tensor, RewardSequences], Tensor]

    def select(self, active: Tensor) -> BoundEmbeddingReward:
        sequences = self.sequences.select(active)
        return self if sequences is self.sequences else replace(self, sequences=sequences)

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.sequences.inputs(tokens, self.embedding)

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        return self.sequences.rows(trajectories, positions)

    def __call__(self, inputs_embeds: Tensor, ids: Tensor) -> Tensor:
        s = self.sequences
        visible = attention_mask(ids, s.valid, s.response, self.eos_token_id, self.pad_token_id)
        return self.read(inputs_embeds, s.keep_first(visible), s)


def twin_of(model: PreTrainedModel) -> Twin:
    """The twin through which a reward reads ``model``.

    Raises:
        ValueError: for a model that cannot be fed input embeddings, or through which no gradient passes.
    """
    model = unwrap("reward", model)
    name = type(model).__name__
    if "inputs_embeds" not in inspect.signature(model.forward).parameters or model.config.is_encoder_decoder:
        raise ValueError(f"reward: {name} does not take inputs_embeds, so no gradient can reach its input")
    refuse_inference_weights("reward", model)
    return Twin(model)


class EmbeddingReward:
    """Base of the rewards that read embeddings. Subclasses say how (``_read``) and what stands around a response.

    Args:
        name: of the model, for errors.
        tokenizer: its tokenizer.
        tables: one or more; a position holds its rows of all of them, side by side.
        missing: ``unk`` or ``zero``: what the model reads for ids of the denoiser that it has no token for.
        include_prompt: without a chat template, whether the text begins with the prompt; where the denoiser reads
            the prompt through a chat template of its own, the response is read alone all the same.
        max_length: context in tokens, or None.
        score_batch_size: texts per forward pass of :meth:`score`.

    Attributes:
        reads_prompt: it scores prompt and response as one plain text (no chat template).
        device: where its model is.
        twin: of the user's model, or None where there is none.
    """

    twin: Twin | None = None

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        tables: Sequence[EmbeddingTable],
        *,
        missing: str,
        include_prompt: bool,
        max_length: int | None,
        score_batch_size: int,
    ) -> None:
        for option, value in {"max_length": max_length, "score_batch_size": score_batch_size}.items():
            if value is None and option == "max_length":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"reward: {option} must be an integer >= 1, got {value!r}")
        self.name, self.tokenizer, self.tables, self.missing = name, tokenizer, tuple(tables), missing
        self.format = TextFormat(name, tokenizer, include_prompt)
        self.max_length, self.score_batch_size = max_length, score_batch_size

    @property
    def reads_prompt(self) -> bool:
        return self.format.reads_prompt

    @property
    def weight(self) -> Tensor:
        """[V, d], the model's input embedding by its own ids."""
        return self.tables[0].full()

    @property
    def device(self) -> torch.device:
        return self.tables[0].weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """What a position reads [..., d] of its own ``ids`` int64 [...]."""
        rows = [table(ids) for table in self.tables]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def refresh(self) -> None:
        """Follow what has changed in the user's model since the last use, see :class:`entrgi.models.wrapping.Twin`."""
        if self.twin is not None:
            self.twin.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(self, denoiser: Denoiser, layouts: Sequence[Layout], copies: int) -> BoundEmbeddingReward:
        """See :class:`entrgi.rewards.Reward`.

        Raises:
            ValueError: for models on different devices, vocabularies that share nothing, a prompt that cannot be
                rendered or does not fit the context.
        """
        self.refresh()
        check_device(self.name, self.device, denoiser)
        alignment = align(denoiser.tokenizer, denoiser.vocab_size, self.tokenizer)
        frames = []
        for index, layout in enumerate(layouts):
            before = self._text_before(layout, denoiser, alignment)
            frame = self._frame(*self.format.frame(layout.prompt, before))
            needed = len(frame.prefix) + layout.stop - layout.start + len(frame.suffix)
            if self.max_length is not None and needed > self.max_length:
                raise ValueError(
                    f"prompts[{index}] needs {needed} tokens in the reward model's format ({self.name}), "
                    f"expected at most its context of {self.max_length}"
                )
            frames.append(frame)
        parts = [align_embedding(table.full(), alignment, self.missing, self.tokenizer) for table in self.tables]
        frames, read = self._reader(frames)
        return BoundEmbeddingReward(
            embedding=parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),
            sequences=build_reward_sequences(frames, layouts, copies, self.embed, self.device),
            eos_token_id=denoiser.eos_token_id,
            pad_token_id=denoiser.pad_token_id,
            read=read,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> Tensor:
        """Rewards of decoded texts, fp32 [n] on the CPU; ``score_batch_size`` texts at once.

        A text that exceeds the context is cut there, with a warning. One without a single token is read as the
        tokenizer's end-of-sequence token alone.

        Raises:
            ValueError: for an empty text where the tokenizer has no such token.
            RuntimeError: naming the text, where a reward is not finite.
        """
        self.refresh()
        values = []
        for begin in range(0, len(completions), self.score_batch_size):
            chunk = completions[begin : begin + self.score_batch_size]
            values.append(self._score([self._ids(completion) for completion in chunk]).float().cpu())
            for value, completion in zip(values[-1].tolist(), chunk, strict=True):
                if value - value != 0:  # NaN or an infinity
                    text = self.format.plain(completion)
                    raise RuntimeError(f"reward: {self.name} gives {value} for the text {text!r:.80}")
        return torch.cat(values) if values else torch.zeros(0)

    def _frame(self, prefix: list[int], suffix: list[int]) -> Frame:
        """What stands around a response. Without anything there, an empty response is read as a single token."""
        if prefix or suffix:
            return Frame(prefix, suffix)
        self.format.for_empty()  # raises where there is no such token: better now than when the texts are scored
        return Frame(prefix, suffix, keeps_first=True)

    def _reader(self, frames: list[Frame]) -> tuple[list[Frame], Callable[[Tensor, Tensor, RewardSequences], Tensor]]:
        """The frames as the buffer holds them, and how the buffer is read."""
        return frames, self._read

    def _read(self, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        return self.relaxed(inputs_embeds, visible)

    def _ids(self, completion: Completion) -> tuple[list[int], int]:
        """Ids of a text within the context, and how many of them stand before what is judged (a subclass's matter)."""
        ids, end = self.format.whole(completion)
        if self.max_length is not None and len(ids) > self.max_length:
            self._warn_cut(len(ids))
            del ids[self.max_length - end : len(ids) - end]
        return ids, 0

    def _score(self, rows: list[tuple[list[int], int]]) -> Tensor:
        """Rewards [n] of padded rows of ids."""
        return self.relaxed(*self._padded([row for row, _ in rows]))

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Input embeddings [n, S, d], zero at the padding on the right, and bool [n, S], which positions are real."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long).to(self.device)
        valid = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).to(self.device)
        return self.embed(ids).masked_fill(~valid[..., None], 0), valid

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [P] of whole sequences.

        Args:
            inputs_embeds: [P, S, d].
            attention_mask: bool [P, S], which positions are attended to. The others keep their place: position
                ids are the plain indices.
        """
        raise NotImplementedError

    def _warn_cut(self, length: int) -> None:
        warnings.warn(f"text of {length} tokens cut to the reward's {self.max_length}", stacklevel=4)

    def _text_before(self, layout: Layout, denoiser: Denoiser, alignment: Alignment) -> list[int]:
        """The plain text before the response window in the reward model's ids."""
        if not self.reads_prompt or alignment.identical:
            return layout.before
        return plain_ids(self.tokenizer, denoiser.tokenizer.decode(layout.before, skip_special_tokens=True))


def check_device(name: str, device: torch.device, denoiser: Denoiser) -> None:
    """Raise ValueError unless both models are on one device."""
    ours, theirs = (d.index or 0 if d.type != "cpu" else None for d in (device, torch.device(denoiser.device)))
    if device.type != torch.device(denoiser.device).type or ours != theirs:
        raise ValueError(
            f"reward: {name} is on {device}, expected the denoiser's device {torch.device(denoiser.device)}"
        )
