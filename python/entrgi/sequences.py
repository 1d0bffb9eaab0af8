"""The ragged batch as data: prompts become token tensors for the denoiser and for the reward model.

Sequences are padded on the right, so a position's index inside its own sequence is its column, whatever
it shares the batch with. Everything is built once, before the first denoising step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entrgi.prompts import Encoded


@dataclass(frozen=True)
class Layout:
    """Where things lie in one trajectory's sequence; columns, ends excluded.

    Attributes:
        text_start: first column of the body.
        start: first column of the response window: the first response position, or the first mask to infill.
        stop: end of the window, which is the end of the text.
        length: end of the sequence, suffix included.
        is_text: see :class:`entrgi.prompts.Encoded`.
    """

    text_start: int
    start: int
    stop: int
    length: int
    is_text: bool


@dataclass(frozen=True)
class Sequences:
    """P trajectories, padded on the right to a common length S.

    Attributes:
        tokens: int64 [P, S], the denoiser's ids; the sampler writes committed tokens into it.
        attention_mask: int64 [P, S], 1 on real tokens; None where no sequence is padded.
        seeds: int64 [P], one seed per trajectory.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    seeds: Tensor

    def select(self, active: Tensor) -> Sequences:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        if active.shape[0] == self.tokens.shape[0]:
            return self
        mask = None if self.attention_mask is None else self.attention_mask[active]
        return Sequences(self.tokens[active], mask, self.seeds[active])


@dataclass(frozen=True)
class RewardSequences:
    """The same P trajectories as the reward model reads them: ``prefix | response | suffix``.

    Attributes:
        frame: [P, S, d], embeddings of prefix and suffix; zero elsewhere.
        valid: bool [P, S], real positions.
        response: bool [P, S], positions of the response window.
        offset: int64 [P], reward column minus denoiser column of a response position.
    """

    frame: Tensor
    valid: Tensor
    response: Tensor
    offset: Tensor

    def select(self, active: Tensor) -> RewardSequences:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        if active.shape[0] == self.frame.shape[0]:
            return self
        return replace(self, **{name: getattr(self, name)[active] for name in self.__dataclass_fields__})

    def inputs(self, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings [P, S, d] and the denoiser's ids [P, S], with the response taken from ``tokens``.

        Outside the response the ids mean nothing. ``tokens`` is int64 [P, S_denoiser], ``embedding`` [V, d].
        """
        columns = torch.arange(self.valid.shape[1], device=tokens.device) - self.offset[:, None]
        ids = tokens.gather(1, columns.clamp(0, tokens.shape[1] - 1))
        return torch.where(self.response[..., None], embedding[ids], self.frame), ids

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        """Rows of the flattened [P * S] buffer for denoiser columns ``positions``; all int64 [N]."""
        return trajectories * self.valid.shape[1] + positions + self.offset[trajectories]


def build_sequences(
    encoded: Sequence[Encoded],
    seeds: Tensor,
    *,
    max_new_tokens: int,
    mask_token_id: int,
    pad_token_id: int | None,
    infill: bool,
    max_length: int | None,
    device: torch.device,
) -> tuple[Sequences, list[Layout], list[int]]:
    """Lay out every prompt with its response masked, K trajectories per prompt.

    Args:
        encoded: B prompts.
        seeds: int64 [B, K], trajectory seeds.
        max_new_tokens: masked positions appended to each prompt.
        infill: whether a prompt may hold ``mask_token_id``.
        max_length: context of the denoiser in tokens, or None.

    Returns:
        the sequences (P = B * K rows, prompt by prompt), the layout of each prompt, and the number of
        masked positions of each trajectory.

    Raises:
        ValueError: for a prompt that holds the mask id without ``infill``, or holds none where
            nothing else is to fill, or does not fit the context.
    """
    copies = seeds.shape[1]
    rows, layouts, masked = [], [], []
    for index, prompt in enumerate(encoded):
        holes = prompt.body.count(mask_token_id)
        if holes and not infill:
            raise ValueError(
                f"prompts[{index}] holds the mask token (id {mask_token_id}) {holes} times; "
                "pass infill=True to have it filled"
            )
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
        layouts.append(Layout(text_start, start, stop, len(row), prompt.is_text))
        masked += [holes + max_new_tokens] * copies

    width = max(map(len, rows))
    pad = 0 if pad_token_id is None else pad_token_id
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = None if bool((lengths == width).all()) else (torch.arange(width) < lengths[:, None]).long()
    if mask is not None:
        mask = mask.repeat_interleave(copies, dim=0).to(device)
    tokens = tokens.repeat_interleave(copies, dim=0).to(device)
    return Sequences(tokens, mask, seeds.reshape(-1).to(device)), layouts, masked


def build_reward_sequences(
    frames: Sequence[tuple[list[int], list[int]]],
    layouts: Sequence[Layout],
    copies: int,
    weight: Tensor,
    max_length: int | None,
) -> RewardSequences:
    """Lay out ``prefix | response | suffix`` for the reward model, K = ``copies`` trajectories per prompt.

    Args:
        frames: (prefix, suffix) of each prompt, in the reward model's ids.
        layouts: of the same prompts.
        weight: [V_reward, d], the reward model's input embedding.
        max_length: context of the reward model in tokens, or None.

    Raises:
        ValueError: for a sequence that does not fit the context.
    """
    windows = [layout.stop - layout.start for layout in layouts]
    lengths = [len(p) + w + len(s) for (p, s), w in zip(frames, windows, strict=True)]
    for index, length in enumerate(lengths):
        if max_length is not None and length > max_length:
            raise ValueError(
                f"prompts[{index}] needs {length} tokens in the reward model's format, "
                f"expected at most its context of {max_length}"
            )
    width = max(lengths)
    frame = weight.new_zeros(len(frames), width, weight.shape[1])
    valid = torch.zeros(len(frames), width, dtype=torch.bool)
    response = torch.zeros(len(frames), width, dtype=torch.bool)
    for i, ((prefix, suffix), window) in enumerate(zip(frames, windows, strict=True)):
        begin, end = len(prefix), len(prefix) + window
        frame[i, :begin] = weight[torch.tensor(prefix, dtype=torch.long, device=weight.device)]
        frame[i, end : lengths[i]] = weight[torch.tensor(suffix, dtype=torch.long, device=weight.device)]
        valid[i, : lengths[i]] = True
        response[i, begin:end] = True
    offset = torch.tensor([len(p) - a.start for (p, _), a in zip(frames, layouts, strict=True)])
    parts = [x.repeat_interleave(copies, dim=0).to(weight.device) for x in (frame, valid, response, offset)]
    return RewardSequences(*parts)
