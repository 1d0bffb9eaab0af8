"""How a reward model reads: texts become ids between what stands around them, and ids become embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entrgi.models.wrapping import check_tokenizer
from entrgi.prompts import Completion, check_template_options, plain_ids
from entrgi.rewards.options import RewardOptions
from entrgi.rewards.sequences import Places
from entrgi.rewards.tables import EmbeddingTable
from entrgi.rewards.text import TextFormat
from entrgi.sequences import Frame, Layout
from entrgi.tokenizing import decode_ids, named_id
from entrgi.vocabulary import Alignment

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser

# A text's ids, and how many of them stand before the response where a reward judges that alone.
Row = tuple[list[int], int]


class Reader:
    """Reads texts for a reward: the same ids and the same embeddings in guidance and in the final score.

    With a chat template the response is the assistant's turn after the prompt's messages; without one, text stands
    between the tokenizer's special tokens.

    Args:
        name: of the model, for errors.
        tokenizer: its tokenizer.
        tables: one or more of an embedding [V, d], the layer that has it, or an :class:`EmbeddingTable`. A position
            holds its rows of all of them, side by side; the first is what the model reads.
        options: which prompt, context and template, see :class:`RewardOptions`.
        judges_response: the reward is of the response after what stands before it, not of the text as a whole. What
            follows the response is then left out, and something always stands before it.
        padding_id: what the model takes for padding at a text's end, so that it is not read there.
        refused: ids that no text may hold, with the reason.

    Raises:
        ValueError: for what is no tokenizer, or arguments that its chat template does not take.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        tables: Sequence[EmbeddingTable | nn.Module | Tensor],
        options: RewardOptions | None = None,
        *,
        judges_response: bool = False,
        padding_id: int | None = None,
        refused: Mapping[int, str] | None = None,
    ) -> None:
        check_tokenizer("reward", tokenizer)
        self.name, self.tokenizer, self.options = name, tokenizer, options or RewardOptions()
        self.tables = tuple(map(EmbeddingTable.of, tables))
        template = check_template_options("reward", tokenizer, self.options.chat_template_kwargs)
        self.format = TextFormat(name, tokenizer, self.options.include_prompt, template)
        self.judges_response, self.padding_id, self.refused = judges_response, padding_id, dict(refused or {})
        self.max_length = self.options.max_length
        self.rows = min(table.weight.shape[0] for table in self.tables)

    @property
    def device(self) -> torch.device:
        return self.tables[0].weight.device

    def frame(self, layout: Layout, denoiser: Denoiser, alignment: Alignment) -> Frame:
        """What stands around a prompt's response window.

        Args:
            alignment: of the denoiser's ids to those of the tokenizer.

        Raises:
            ValueError: for messages that cannot be rendered, a token that the model has no embedding of, or an empty
                text that nothing stands for: better now than when the texts are scored.
        """
        before = layout.before
        if self.format.reads_prompt and not alignment.identical:
            before = plain_ids(self.tokenizer, decode_ids(denoiser.tokenizer, before, skip_special_tokens=True))
        prefix, suffix = self.format.frame(layout.prompt, before)
        if self.judges_response:
            prefix, suffix = self._begun(prefix), []
        suffix = self._unpadded(suffix)
        self.known([*prefix, *suffix])
        if self.judges_response or not (prefix or suffix):
            self.format.for_empty()
        return Frame(prefix, suffix, layout.window)

    def ids(self, completion: Completion) -> Row:
        """A text within the context, which is cut there with a warning.

        Raises:
            ValueError: where no place is left for the response, for a token that the model has no embedding of, and
                for an empty text that nothing stands for.
        """
        ids, begin, end = self.whole(completion)
        if self.max_length is not None and len(ids) > self.max_length:
            if begin >= self.max_length:
                raise ValueError(
                    f"reward: {begin} tokens stand before the response for {self.name}, "
                    f"expected fewer than its context of {self.max_length}"
                )
            warnings.warn(f"text of {len(ids)} tokens cut to the reward's {self.max_length}", stacklevel=3)
            del ids[self.max_length - end : len(ids) - end]
        return self.known(ids), begin

    def embed(self, ids: Tensor) -> Tensor:
        """What a position holds [..., d] of its own ``ids`` int64 [...]."""
        rows = [table(ids) for table in self.tables]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Places]:
        """Arguments of a head for whole texts: embeddings [n, S, d], zero at the padding, which are real, and what."""
        ids, valid = self.padded([ids for ids, _ in rows])
        begins = torch.tensor([begin for _, begin in rows])[:, None].to(self.device)
        response = valid & (torch.arange(valid.shape[1], device=self.device) >= begins)
        return self.embed(ids).masked_fill(~valid[..., None], 0), valid, Places.whole(response)

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids [n, S], padded on the right with 0, and bool [n, S], which positions are real."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long).to(self.device)
        return ids, (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).to(self.device)

    def whole(self, completion: Completion) -> tuple[list[int], int, int]:
        """A text of any length as a :data:`Row`, and how many of its last ids are the frame's."""
        if self.judges_response:
            before, response = self.format.split(completion)
            before = self._begun(before)
            return before + response, len(before), 0
        ids, end = self.format.whole(completion)
        read = self._unpadded(ids) or ids[:1]
        return read, 0, max(0, end - len(ids) + len(read))

    def _begun(self, prefix: list[int]) -> list[int]:
        """``prefix``, never empty: the first response token needs something that predicts it."""
        if prefix:
            return prefix
        bos = named_id(self.tokenizer, "bos")
        if bos is None:
            raise ValueError(
                f"reward: nothing stands before the response for {self.name} to predict its first token from "
                "(no chat template, no prompt text, and its tokenizer has no begin-of-sequence token)"
            )
        return [bos]

    def _unpadded(self, ids: list[int]) -> list[int]:
        """``ids`` up to the last one that the model takes for text."""
        length = len(ids)
        while self.padding_id is not None and length > 0 and ids[length - 1] == self.padding_id:
            length -= 1
        return ids[:length]

    def known(self, ids: list[int]) -> list[int]:
        """``ids``; ValueError where one is refused, or the model's embedding has no row for it."""
        for token_id in ids:
            if token_id in self.refused:
                token = self.tokenizer.convert_ids_to_tokens(token_id)
                raise ValueError(f"reward: {self.name} {self.refused[token_id]} {token!r}, expected none of it")
            if not 0 <= token_id < self.rows:
                token = self.tokenizer.convert_ids_to_tokens(token_id)
                raise ValueError(
                    f"reward: the tokenizer of {self.name} has id {token_id} for {token!r}, expected an id below "
                    f"{self.rows}, the rows of the model's embedding"
                )
        return ids
