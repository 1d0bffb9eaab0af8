"""The trajectories as a reward model reads them: ``prefix | response | suffix``, or without a prefix that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entrgi.sequences import Layout


@dataclass(frozen=True)
class Frame:
    """What stands around one prompt's response, in the reward model's ids.

    Attributes:
        prefix, suffix: ids before and after the response, in the buffer.
        kept: number of positions before ``prefix`` that are not in the buffer (a prefix whose keys are kept).
        keeps_first: the response's first position stays visible where nothing else of it would be.
    """

    prefix: list[int]
    suffix: list[int]
    kept: int = 0
    keeps_first: bool = False


@dataclass(frozen=True)
class RewardSequences:
    """A <= B * K trajectories, padded on the right to a common length S.

    Attributes:
        frame: [B, S, d], embeddings of each prompt's prefix and suffix; zero elsewhere. Shared by its copies.
        prompt: int64 [A], row of ``frame``.
        valid: bool [A, S], real positions.
        response: bool [A, S], positions of the response window.
        first: bool [A, S], the position that stays visible where nothing of the response would be, if any.
        positions: int64 [A, S], index of each column in the whole sequence; padding repeats the last one.
        offset: int64 [A], column minus denoiser column of a response position.
        copies: K, where these are all B * K trajectories; None after a selection.
    """

    frame: Tensor
    prompt: Tensor
    valid: Tensor
    response: Tensor
    first: Tensor
    positions: Tensor
    offset: Tensor
    copies: int | None

    def select(self, active: Tensor) -> RewardSequences:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        if active.shape[0] == self.prompt.shape[0]:
            return self
        names = ("prompt", "valid", "response", "first", "positions", "offset")
        return replace(self, copies=None, **{name: getattr(self, name)[active] for name in names})

    def inputs(self, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings [A, S, d] and the denoiser's ids [A, S], with the response taken from ``tokens``.

        Outside the response the ids mean nothing. ``tokens`` is int64 [A, S_denoiser], ``embedding`` [V, d].
        """
        columns = torch.arange(self.valid.shape[1], device=tokens.device) - self.offset[:, None]
        ids = tokens.gather(1, columns.clamp(0, tokens.shape[1] - 1))
        return torch.where(self.response[..., None], embedding[ids], self.frame[self.prompt]), ids

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        """Rows of the flattened [A * S] buffer for denoiser columns ``positions``; all int64 [N]."""
        return trajectories * self.valid.shape[1] + positions + self.offset[trajectories]

    def keep_first(self, visible: Tensor) -> Tensor:
        """``visible`` (bool [A, S]) with the first response position where a response must not be empty."""
        return visible | (self.first & ~(visible & self.response).any(dim=1, keepdim=True))


def build_reward_sequences(
    frames: Sequence[Frame],
    layouts: Sequence[Layout],
    copies: int,
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
) -> RewardSequences:
    """Lay out every prompt's frame around its response window, K = ``copies`` trajectories per prompt.

    Args:
        frames, layouts: of the same B prompts.
        embed: ids int64 [n] on ``device`` -> their input embeddings [n, d].
    """
    windows = [layout.stop - layout.start for layout in layouts]
    lengths = [len(f.prefix) + w + len(f.suffix) for f, w in zip(frames, windows, strict=True)]
    shape = (len(frames), max(lengths))
    sample = embed(torch.zeros(0, dtype=torch.long, device=device))
    frame = sample.new_zeros(*shape, sample.shape[1])
    response, first = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for i, (f, window) in enumerate(zip(frames, windows, strict=True)):
        begin, end = len(f.prefix), len(f.prefix) + window
        ids = torch.tensor(f.prefix + f.suffix, dtype=torch.long, device=device)
        rows = embed(ids)
        frame[i, :begin], frame[i, end : lengths[i]] = rows[:begin], rows[begin:]
        response[i, begin:end] = True
        first[i, begin] = f.keeps_first
    index, length = torch.arange(shape[1]), torch.tensor(lengths)[:, None]
    kept = torch.tensor([f.kept for f in frames])
    per_prompt = {
        "prompt": torch.arange(len(frames)),
        "valid": index < length,
        "response": response,
        "first": first,
        "positions": kept[:, None] + index.minimum(length - 1),
        "offset": torch.tensor([len(f.prefix) - a.start for f, a in zip(frames, layouts, strict=True)]),
    }
    per_copy = {name: x.repeat_interleave(copies, dim=0).to(device) for name, x in per_prompt.items()}
    return RewardSequences(frame=frame, copies=copies, **per_copy)
