"""The ragged batch as data: prompts become token tensors for the denoiser.

Sequences are padded on the right, so a position's index inside its own sequence is its column, whatever
it shares the batch with. Everything is built once, before the first denoising step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from numbers import Integral

import torch
from torch import Tensor

from entrgi.prompts import Encoded, Prompt


@dataclass(frozen=True)
class Frame:
    """What stands before and after a window of a sequence, in one model's ids.

    Attributes:
        prefix, suffix: ids before and after the window.
        window: number of columns of the window.
        kept: number of positions before ``prefix`` that are not columns (keys and values of them are kept).
    """

    prefix: list[int]
    suffix: list[int]
    window: int
    kept: int = field(default=0, kw_only=True)

    @property
    def start(self) -> int:
        """First column of the window."""
        return len(self.prefix)

    @property
    def stop(self) -> int:
        """End of the window, excluded."""
        return len(self.prefix) + self.window

    @property
    def length(self) -> int:
        """End of the sequence, suffix included."""
        return self.stop + len(self.suffix)


@dataclass(frozen=True)
class Layout(Frame):
    """A prompt as the denoiser reads it, around the response window.

    The window begins at the first response position, or at the first mask to infill, and ends where the text ends.

    Attributes:
        prompt: text or messages, as the user gave it.
        before: the denoiser's ids of what the window continues: the plain text before it, or the turn that the last
            message of a chat has begun; empty where it answers a chat.
        end_ids: the denoiser's ids behind which guidance hides a response.
    """

    prompt: Prompt
    before: list[int]
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sequences:
    """P trajectories, padded on the right to a common length S.

    Attributes:
        tokens: int64 [P, S], the denoiser's ids; the sampler writes committed tokens into it.
        attention_mask: int64 [P, S], 1 on real tokens; None where no sequence is padded.
        window: bool [P, S], the response window.
        seeds: int64 [P], one seed per trajectory.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    window: Tensor
    seeds: Tensor

    def select(self, active: Tensor) -> Sequences:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        if active.shape[0] == self.tokens.shape[0]:
            return self
        mask = None if self.attention_mask is None else self.attention_mask[active]
        return Sequences(self.tokens[active], mask, self.window[active], self.seeds[active])


def holds_any(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """bool [...]: where ``tokens`` is one of ``ids``, of which there is at least one. Never waits for the device."""
    return reduce(torch.logical_or, (tokens == token_id for token_id in ids))


def check_length(name: str, value: int) -> int:
    """``value``, such as the context of a model; ValueError unless it is an integer >= 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def build_sequences(
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    seeds: Tensor,
    *,
    max_new_tokens: int,
    mask_token_id: int,
    pad_token_id: int | None,
    infill: bool | None,
    max_length: int | None,
    device: torch.device,
    end_ids: tuple[int, ...] = (),
) -> tuple[Sequences, list[Layout], list[list[int]]]:
    """Lay out every prompt with its response masked, K trajectories per prompt.

    Args:
        prompts, encoded: B prompts, as the user gave them and as ids.
        seeds: int64 [B, K], trajectory seeds.
        max_new_tokens: masked positions appended to each prompt.
        infill: whether a prompt may hold ``mask_token_id``.
        end_ids: see :class:`Layout`.
        max_length: context of the denoiser in tokens, or None.

    Returns:
        the sequences (P = B * K rows, prompt by prompt), the layout of each prompt, and the columns that
        are masked in each trajectory.

    Raises:
        ValueError: for a prompt that holds the mask id without ``infill``, or holds none where
            nothing else is to fill, or does not fit the context.
    """
    copies = seeds.shape[1]
    rows, layouts, masked = [], [], []
    for index, (given, prompt) in enumerate(zip(prompts, encoded, strict=True)):
        holes = prompt.body.count(mask_token_id)
        if holes and not infill:
            ways = (
                "pass infill=True to have it filled, or infill=False to have it read as the text that it spells"
                if infill is None
                else "the tokenizer can write it in no other way, expected a prompt without it"
            )
            raise ValueError(f"prompts[{index}] holds the mask token (id {mask_token_id}) {holes} times; {ways}")
        if not holes and not max_new_tokens:
            raise ValueError(
                f"prompts[{index}] holds no mask token (id {mask_token_id}) and max_new_tokens is 0: "
                "expected something to fill"
            )
        row = [*prompt.prefix, *prompt.body, *[mask_token_id] * max_new_tokens, *prompt.suffix]
        if max_length is not None and len(row) > max_length:
            raise ValueError(
                f"prompts[{index}] needs {len(row)} tokens ({len(row) - max_new_tokens} of prompt and "
                f"special tokens, max_new_tokens {max_new_tokens}), expected at most the denoiser's context "
                f"of {max_length}"
            )
        rows.append(row)
        text_start, stop = len(prompt.prefix), len(row) - len(prompt.suffix)
        start = row.index(mask_token_id, text_start) if holes else stop - max_new_tokens
        before = row[text_start:start] if prompt.is_text else prompt.begun
        layouts.append(Layout(row[:start], row[stop:], stop - start, given, before, end_ids))
        masked += [[i for i in range(start, stop) if row[i] == mask_token_id]] * copies

    width = max(map(len, rows))
    pad = 0 if pad_token_id is None else pad_token_id
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = None if bool((lengths == width).all()) else (torch.arange(width) < lengths[:, None]).long()
    if mask is not None:
        mask = mask.repeat_interleave(copies, dim=0).to(device)
    column = torch.arange(width)
    inside = [(column >= layout.start) & (column < layout.stop) for layout in layouts]
    window = torch.stack(inside).repeat_interleave(copies, dim=0).to(device)
    tokens = tokens.repeat_interleave(copies, dim=0).to(device)
    return Sequences(tokens, mask, window, seeds.reshape(-1).to(device)), layouts, masked
