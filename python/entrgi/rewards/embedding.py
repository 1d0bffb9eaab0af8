"""A reward over input embeddings: what a reader reads of the texts, and what a head makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.wrapping import Twin, callable_twin, refuse_inference_weights, unwrap_pretrained
from entrgi.prompts import Completion, Prompt
from entrgi.rewards.masks import attention_mask
from entrgi.rewards.protocol import DeprecatedRows, Head
from entrgi.rewards.reader import Reader
from entrgi.rewards.sequences import Places, RewardSequences, build_reward_sequences
from entrgi.rewards.text import as_completions
from entrgi.sequences import Frame, Layout, holds_any
from entrgi.vocabulary import align, align_embedding

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser
    from entrgi.rewards.backbone import CausalBackbone
    from entrgi.rewards.prefix import Prefix


class EmbeddingReward:
    """A reward of a *reader* (texts to embeddings) and a *head* (embeddings to rewards).

    Args:
        reader: how texts are read.
        head: ``(inputs_embeds [P, S, d], visible bool [P, S], places) -> rewards [P]``, see
            :class:`entrgi.rewards.Head`. A module runs through a twin that shares its weights, in evaluation mode and
            without gradients of them, and is not changed itself.
        backbone: keeps keys and values of what stands before the responses, once per generation, for a head that
            reads on behind ``places.prefix``; None: the head gets whole sequences.
        twin: of the model that ``head`` runs, where it is one already.

    Attributes:
        name: of the model.
        twin: of the user's model, or None where there is none.
    """

    def __init__(
        self, reader: Reader, head: Head, *, backbone: CausalBackbone | None = None, twin: Twin | None = None
    ) -> None:
        if isinstance(head, nn.Module):
            refuse_inference_weights("reward", head)
            head, twin = callable_twin("reward", head)
        self.reader, self.head, self.backbone, self.twin, self.name = reader, head, backbone, twin, reader.name

    @property
    def reads_prompt(self) -> bool:
        """Whether it scores prompt and response as one plain text (no chat template)."""
        return self.reader.format.reads_prompt

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reader.tokenizer

    @property
    def weight(self) -> Tensor:
        """[V, d], the model's input embedding by its own ids."""
        return self.reader.tables[0].full()

    @property
    def device(self) -> torch.device:
        """Where its model is."""
        return self.reader.device

    def refresh(self) -> None:
        """Follow what has changed in the user's model since the last use, see :class:`entrgi.models.wrapping.Twin`."""
        if self.twin is not None:
            self.twin.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(self, denoiser: Denoiser, layouts: Sequence[Layout], num_trajectories: int) -> BoundEmbeddingReward:
        """See :class:`entrgi.rewards.Reward`.

        Raises:
            ValueError: for models on different devices, vocabularies that share nothing, a prompt that cannot be
                rendered or does not fit the context.
        """
        self.refresh()
        reader, device = self.reader, self.device
        check_device(self.name, device, denoiser)
        alignment = align(denoiser.tokenizer, denoiser.vocab_size, reader.tokenizer)
        frames = []
        for index, layout in enumerate(layouts):
            frame = reader.frame(layout, denoiser, alignment)
            if reader.max_length is not None and frame.length > reader.max_length:
                raise ValueError(
                    f"prompts[{index}] needs {frame.length} tokens in the reward model's format ({self.name}), "
                    f"expected at most its context of {reader.max_length}"
                )
            frames.append(frame)
        unmapped = reader.options.unmapped
        tables = [align_embedding(table.full(), alignment, unmapped, reader.tokenizer) for table in reader.tables]
        # A response's end is not read where a text's is not: a decoded text is scored without it.
        ends = layouts[0].end_ids
        unread = [end for end in ends if reader.padding_id is not None and int(alignment.ids[end]) == reader.padding_id]
        if any(frame.suffix for frame in frames):
            unread = []
        prefix = self._kept(frames)
        if prefix is not None:
            frames = [replace(frame, prefix=[], kept=frame.start) for frame in frames]
        starts = [layout.start for layout in layouts]
        return BoundEmbeddingReward(
            embedding=tables[0] if len(tables) == 1 else torch.cat(tables, dim=1),
            sequences=build_reward_sequences(
                frames, starts, num_trajectories, reader.embed, device, prefix, keeps_first=reader.judges_response
            ),
            end_ids=ends,
            pad_token_id=denoiser.pad_token_id,
            head=self.head,
            unread=tuple(unread),
        )

    def _kept(self, frames: Sequence[Frame]) -> Prefix | None:
        """Keys and values of what stands before the responses, where they are kept."""
        if self.backbone is None or not any(frame.prefix for frame in frames):
            return None
        ids, valid = self.reader.padded([frame.prefix or [0] for frame in frames])
        embeds = self.reader.tables[0](ids).masked_fill(~valid[..., None], 0)
        return self.backbone.prefix(embeds, torch.tensor([frame.start for frame in frames], device=self.device))

    @torch.inference_mode(False)
    @torch.no_grad()
    def score(self, completions: Sequence[Completion | str | tuple[Prompt, str]] | str) -> Tensor:
        """Rewards of decoded texts, fp32 [n] on the CPU; ``score_batch_size`` texts at once.

        A text that exceeds the context is cut there, with a warning. One without a single token is read as the
        tokenizer's end-of-sequence token alone.

        Args:
            completions: also plain texts and (prompt, response) pairs, see
                :func:`entrgi.rewards.text.as_completions`.

        Raises:
            ValueError: for an empty text where the tokenizer has no such token, and for a text with a token that
                the model has no embedding of.
            RuntimeError: naming the text, where a reward is not finite.
        """
        self.refresh()
        completions, values, size = as_completions(completions), [], self.reader.options.score_batch_size
        for begin in range(0, len(completions), size):
            chunk = completions[begin : begin + size]
            values.append(self.head(*self.reader.batch([self.reader.ids(text) for text in chunk])).float().cpu())
            for value, completion in zip(values[-1].tolist(), chunk, strict=True):
                if value - value != 0:  # NaN or an infinity
                    text = self.reader.format.plain(completion)
                    raise RuntimeError(f"reward: {self.name} gives {value} for the text {text!r:.80}")
        return torch.cat(values) if values else torch.zeros(0)

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor, response: Tensor | None = None) -> Tensor:
        """Rewards [P] of whole sequences; differentiable in ``inputs_embeds``.

        Args:
            inputs_embeds: [P, S, d].
            attention_mask: bool [P, S], which positions are attended to. The others keep their place: position
                ids are the plain indices.
            response: bool [P, S], which of them are the response's; None: all but the first, which nothing precedes.
        """
        if response is None:
            response = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask) > 0
        return self.head(inputs_embeds, attention_mask, Places.whole(response))


@dataclass(frozen=True)
class BoundEmbeddingReward(DeprecatedRows):
    """See :class:`entrgi.rewards.BoundReward`.

    Attributes:
        embedding: [V, d], by the denoiser's ids.
        sequences: the trajectories as the reward reads them.
        end_ids, pad_token_id: the denoiser's; they end and hide positions of a response.
        head: makes rewards of embeddings.
        unread: ids of the denoiser that are hidden in the response.
    """

    embedding: Tensor
    sequences: RewardSequences
    end_ids: tuple[int, ...]
    pad_token_id: int | None
    head: Head
    unread: tuple[int, ...] = ()

    def select(self, active: Tensor) -> BoundEmbeddingReward:
        sequences = self.sequences.select(active)
        return self if sequences is self.sequences else replace(self, sequences=sequences)

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.sequences.inputs(tokens, self.embedding)

    def row_index(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        return self.sequences.row_index(trajectories, positions)

    def __call__(self, inputs_embeds: Tensor, ids: Tensor) -> Tensor:
        s = self.sequences
        visible = attention_mask(ids, s.valid, s.response, self.end_ids, self.pad_token_id)
        if self.unread:
            visible = visible & ~(s.response & holds_any(ids, self.unread))
        return self.head(inputs_embeds, s.keep_first(visible), s)


def twin_of(model: PreTrainedModel) -> Twin:
    """The twin through which a reward reads ``model``.

    Raises:
        ValueError: for a model that cannot be fed input embeddings, or through which no gradient passes.
    """
    model = unwrap_pretrained("reward", model)
    name = type(model).__name__
    taken = inspect.signature(model.forward).parameters
    if "forward" in vars(model) and any(option.kind is option.VAR_KEYWORD for option in taken.values()):
        taken = inspect.signature(type(model).forward).parameters  # to which it hands on whatever it is given
    if "inputs_embeds" not in taken or model.config.is_encoder_decoder:
        raise ValueError(f"reward: {name} does not take inputs_embeds, so no gradient can reach its input")
    try:
        model.get_input_embeddings()
    except NotImplementedError as error:
        raise ValueError(f"reward: {name} has no input embedding, so no gradient can reach its input") from error
    refuse_inference_weights("reward", model)
    return Twin(model)


def check_device(name: str, device: torch.device, denoiser: Denoiser) -> None:
    """Raise ValueError unless both models are on one device."""
    ours, theirs = (d.index or 0 if d.type != "cpu" else None for d in (device, torch.device(denoiser.device)))
    if device.type != torch.device(denoiser.device).type or ours != theirs:
        raise ValueError(
            f"reward: {name} is on {device}, expected the denoiser's device {torch.device(denoiser.device)}"
        )
