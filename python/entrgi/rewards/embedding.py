"""What all rewards that read input embeddings share: options, vocabulary, layout, and scores in chunks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.errors import reason_of
from entrgi.models.wrapping import Twin, check_tokenizer, refuse_inference_weights, unwrap_pretrained
from entrgi.prompts import Completion, Prompt, check_template_options, plain_ids
from entrgi.rewards.masks import attention_mask
from entrgi.rewards.sequences import Frame, RewardSequences, build_reward_sequences
from entrgi.rewards.text import TextFormat, as_completions
from entrgi.sequences import Layout, holds_any
from entrgi.vocabulary import Alignment, align, align_embedding

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser


class EmbeddingTable:
    """Input embeddings by id: a matrix, or a layer that does more than look up its rows.

    Gemma scales the rows of its embedding inside that layer (in transformers 5; inside the model before), so
    what the model is to be fed is the layer's output.

    Args:
        rows: [V, d], or the module that has them as its ``weight``, which is asked for it every time.
        layer: the layer that looks them up, or what else maps ids to what the model is fed; None: the rows are used as
            they are.

    Raises:
        ValueError: for weights on the meta device, or a layer that returns more than embeddings.
    """

    def __init__(self, rows: Tensor | nn.Module, layer: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows, self.layer = rows, layer
        if self.weight.is_meta:
            raise ValueError("reward: its embedding is on the meta device, expected loaded weights")
        if layer is not None:
            probe = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)
            looked_up = layer(probe)
            if not isinstance(looked_up, Tensor):
                raise ValueError(f"reward: its embedding layer returns a {type(looked_up).__name__}, expected a tensor")
            # An adapter's layer is no embedding, and does not stay what it is.
            if isinstance(layer, nn.Embedding) and torch.equal(looked_up, self.weight[probe]):
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
        end_ids, pad_token_id: the denoiser's; they end and hide positions of a response.
        read: (inputs_embeds [A, S, d], visible bool [A, S], sequences) -> rewards [A].
        unread: ids of the denoiser that are hidden in the response.
    """

    embedding: Tensor
    sequences: RewardSequences
    end_ids: tuple[int, ...]
    pad_token_id: int | None
    read: Callable[[Tensor, Tensor, RewardSequences], Tensor]
    unread: tuple[int, ...] = ()

    def select(self, active: Tensor) -> BoundEmbeddingReward:
        sequences = self.sequences.select(active)
        return self if sequences is self.sequences else replace(self, sequences=sequences)

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.sequences.inputs(tokens, self.embedding)

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        return self.sequences.rows(trajectories, positions)

    def __call__(self, inputs_embeds: Tensor, ids: Tensor) -> Tensor:
        s = self.sequences
        visible = attention_mask(ids, s.valid, s.response, self.end_ids, self.pad_token_id)
        if self.unread:
            visible = visible & ~(s.response & holds_any(ids, self.unread))
        return self.read(inputs_embeds, s.keep_first(visible), s)


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
        chat_template_kwargs: arguments of the chat template, see :func:`entrgi.prompts.check_template_options`.

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
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        check_tokenizer("reward", tokenizer)
        for option, value in {"max_length": max_length, "score_batch_size": score_batch_size}.items():
            if value is None and option == "max_length":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"reward: {option} must be an integer >= 1, got {value!r}")
        self.name, self.tokenizer, self.tables, self.missing = name, tokenizer, tuple(tables), missing
        options = check_template_options("reward", tokenizer, chat_template_kwargs)
        self.format = TextFormat(name, tokenizer, include_prompt, options)
        self.max_length, self.score_batch_size = max_length, score_batch_size
        self.rows = min(table.weight.shape[0] for table in self.tables)

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
        ends = _hiding(denoiser, layouts)
        unread = () if any(frame.suffix for frame in frames) else self._unread(ends, alignment)
        frames, read = self._reader(frames)
        return BoundEmbeddingReward(
            embedding=parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),
            sequences=build_reward_sequences(frames, layouts, copies, self.embed, self.device),
            end_ids=ends,
            pad_token_id=denoiser.pad_token_id,
            read=read,
            unread=unread,
        )

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
        completions, values = as_completions(completions), []
        for begin in range(0, len(completions), self.score_batch_size):
            chunk = completions[begin : begin + self.score_batch_size]
            values.append(self.score_rows([self._ids(completion) for completion in chunk]).float().cpu())
            for value, completion in zip(values[-1].tolist(), chunk, strict=True):
                if value - value != 0:  # NaN or an infinity
                    text = self.format.plain(completion)
                    raise RuntimeError(f"reward: {self.name} gives {value} for the text {text!r:.80}")
        return torch.cat(values) if values else torch.zeros(0)

    def probes(self) -> list[tuple[list[int], int]]:
        """Two texts of the tokenizer's own tokens, of different lengths, as :meth:`score` reads them.

        Raises:
            ValueError: where what stands around every text has a token that the model has no embedding of.
        """
        try:
            return self._probes()
        except ValueError:
            raise
        except Exception as error:  # a chat template may be anything
            raise ValueError(f"reward: the tokenizer of {self.name} cannot read a text: {reason_of(error)}") from error

    def _probes(self) -> list[tuple[list[int], int]]:
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        words = [i for i in range(min(self.rows, len(self.tokenizer))) if i not in special] or [0]
        # Spread over the vocabulary, and not to be found in whole by a tokenizer that knows the plainest text only.
        spread = [words[i * (len(words) - 1) // 11] for i in range(12)]
        parts = [spread[:8], spread[8:11]]
        rows = []
        for part in parts:
            text, prompt = self.tokenizer.decode(part), self.tokenizer.decode(spread[11:])
            try:
                ids, begin, _ = self._encoded(Completion(prompt, f"{prompt} {text}", text))
            except ValueError:  # no place for an answer, or nothing before it: an error where texts are given
                ids, begin = part, 1
            rows.append((self.known(ids), begin))
        longest = len(rows[0][0])
        if self.max_length is not None and longest > self.max_length:
            rows[0], longest = (parts[0][: self.max_length], 1), self.max_length
        if len(rows[1][0]) >= longest > 1:
            rows[1] = parts[1][: max(2, longest // 2)], 1
        return rows

    def known(self, ids: list[int]) -> list[int]:
        """``ids``; ValueError where the model's embedding has no row for one of them."""
        for token_id in ids:
            if not 0 <= token_id < self.rows:
                token = self.tokenizer.convert_ids_to_tokens(token_id)
                raise ValueError(
                    f"reward: the tokenizer of {self.name} has id {token_id} for {token!r}, expected an id below "
                    f"{self.rows}, the rows of the model's embedding"
                )
        return ids

    def _frame(self, prefix: list[int], suffix: list[int]) -> Frame:
        """What stands around a response. Without anything there, an empty response is read as a single token."""
        self.known([*prefix, *suffix])
        if prefix or suffix:
            return Frame(prefix, suffix)
        self.format.for_empty()  # raises where there is no such token: better now than when the texts are scored
        return Frame(prefix, suffix, keeps_first=True)

    def _unread(self, ends: tuple[int, ...], alignment: Alignment) -> tuple[int, ...]:
        """Those of the denoiser's end ids that the model does not read at a text's end."""
        return ()

    def _reader(self, frames: list[Frame]) -> tuple[list[Frame], Callable[[Tensor, Tensor, RewardSequences], Tensor]]:
        """The frames as the buffer holds them, and how the buffer is read."""
        return frames, self._read

    def _read(self, inputs_embeds: Tensor, visible: Tensor, sequences: RewardSequences) -> Tensor:
        return self.relaxed(inputs_embeds, visible)

    def _ids(self, completion: Completion) -> tuple[list[int], int]:
        """Ids of a text within the context, and how many of them stand before what is judged."""
        ids, begin, end = self._encoded(completion)
        if self.max_length is not None and len(ids) > self.max_length:
            if begin >= self.max_length:
                raise ValueError(
                    f"reward: {begin} tokens stand before the response for {self.name}, "
                    f"expected fewer than its context of {self.max_length}"
                )
            warnings.warn(f"text of {len(ids)} tokens cut to the reward's {self.max_length}", stacklevel=3)
            del ids[self.max_length - end : len(ids) - end]
        return self.known(ids), begin

    def _encoded(self, completion: Completion) -> tuple[list[int], int, int]:
        """Ids of a text, how many of them stand before what is judged (a subclass's matter), and which are kept.

        These are the last ones, of the frame: where a text exceeds the context, what stands before them is cut.
        """
        ids, end = self.format.whole(completion)
        return ids, 0, end

    def score_rows(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """Rewards [n] of rows of ids, each with the number of ids before what is judged, in one padded batch."""
        return self.score_padded(*self.padded([ids for ids, _ in rows]), [begin for _, begin in rows])

    def score_padded(self, inputs_embeds: Tensor, valid: Tensor, begins: Sequence[int]) -> Tensor:
        """Rewards [n] of what :meth:`padded` returns; ``begins`` says how many positions are not judged."""
        return self.relaxed(inputs_embeds, valid)

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
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

    def _text_before(self, layout: Layout, denoiser: Denoiser, alignment: Alignment) -> list[int]:
        """The plain text before the response window in the reward model's ids."""
        if not self.reads_prompt or alignment.identical:
            return layout.before
        return plain_ids(self.tokenizer, denoiser.tokenizer.decode(layout.before, skip_special_tokens=True))


def _hiding(denoiser: Denoiser, layouts: Sequence[Layout]) -> tuple[int, ...]:
    """The ids behind which a response is hidden."""
    chosen = next((layout.end_ids for layout in layouts), None)
    if chosen is None:
        return () if denoiser.eos_token_id is None else (denoiser.eos_token_id,)
    return chosen


def input_layer(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What maps ids to what ``model`` reads of them where it is fed embeddings.

    Over ids, ESM scales its embeddings by the share that was not masked in its training.
    """
    layer = model.get_input_embeddings()
    return (lambda ids: layer(ids) * (1 - 0.15 * 0.8)) if scales_by_share(model) else layer


def scales_by_share(model: PreTrainedModel) -> bool:
    """Whether ``model`` scales its embeddings by the share of the mask token among the ids."""
    return model.config.model_type == "esm" and model.config.token_dropout


def check_device(name: str, device: torch.device, denoiser: Denoiser) -> None:
    """Raise ValueError unless both models are on one device."""
    ours, theirs = (d.index or 0 if d.type != "cpu" else None for d in (device, torch.device(denoiser.device)))
    if device.type != torch.device(denoiser.device).type or ours != theirs:
        raise ValueError(
            f"reward: {name} is on {device}, expected the denoiser's device {torch.device(denoiser.device)}"
        )
