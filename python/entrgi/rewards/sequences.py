"""The trajectories as a reward model reads them: ``prefix | response | suffix``, or without a prefix that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entrgi.sequences import Frame

if TYPE_CHECKING:
    from entrgi.rewards.prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class Places:
    """What the columns of A sequences of embeddings [A, S, d] are.

    Attributes:
        response: bool [A, S], positions of the response.
        positions: int64 [A, S], index of each column in the whole sequence; padding repeats the last one.
        prefix: keys and values of what stands before column 0; None where nothing does.
        prompt: int64 [A], row of what the trajectories of one prompt share, such as ``prefix``.
        num_trajectories: K, where these are all B * K trajectories; None after a selection.
    """

    response: Tensor
    positions: Tensor
    prefix: Prefix | None = None
    prompt: Tensor | None = None
    num_trajectories: int | None = None

    @classmethod
    def whole(cls, response: Tensor) -> Places:
        """Of sequences that begin at column 0 and are read whole."""
        return cls(
            response=response, positions=torch.arange(response.shape[1], device=response.device).expand_as(response)
        )


@dataclass(frozen=True, kw_only=True)
class RewardSequences(Places):
    """A <= B * K trajectories, padded on the right to a common length S.

    Attributes:
        frame: [B, S, d], embeddings of each prompt's prefix and suffix; zero elsewhere. Shared by its copies.
        valid: bool [A, S], real positions.
        first: bool [A, S], the position that stays visible where nothing of the response would be, if any.
        offset: int64 [A], column minus denoiser column of a response position.
    """

    frame: Tensor
    valid: Tensor
    first: Tensor
    offset: Tensor

    def select(self, active: Tensor) -> RewardSequences:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        assert self.prompt is not None  # of trajectories always
        if active.shape[0] == self.prompt.shape[0]:
            return self
        names = ("prompt", "valid", "response", "first", "positions", "offset")
        return replace(self, num_trajectories=None, **{name: getattr(self, name)[active] for name in names})

    def inputs(self, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings [A, S, d] and the denoiser's ids [A, S], with the response taken from ``tokens``.

        Outside the response the ids mean nothing. ``tokens`` is int64 [A, S_denoiser], ``embedding`` [V, d].
        """
        columns = torch.arange(self.valid.shape[1], device=tokens.device) - self.offset[:, None]
        ids = tokens.gather(1, columns.clamp(0, tokens.shape[1] - 1))
        return torch.where(self.response[..., None], embedding[ids], self.frame[self.prompt]), ids

    def row_index(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        """Rows of the flattened [A * S] buffer for denoiser columns ``positions``; all int64 [N]."""
        return trajectories * self.valid.shape[1] + positions + self.offset[trajectories]

    def keep_first(self, visible: Tensor) -> Tensor:
        """``visible`` (bool [A, S]) with the first response position where a response must not be empty."""
        return visible | (self.first & ~(visible & self.response).any(dim=1, keepdim=True))


def build_reward_sequences(
    frames: Sequence[Frame],
    starts: Sequence[int],
    num_trajectories: int,
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    prefix: Prefix | None = None,
    keeps_first: bool = False,
) -> RewardSequences:
    """Lay out every prompt's frame around its response window, K = ``num_trajectories`` trajectories per prompt.

    Args:
        frames: of B prompts, in the reward model's ids.
        starts: the denoiser's first column of each window.
        embed: ids int64 [n] on ``device`` -> their input embeddings [n, d].
        prefix: of the prompts, where their frames leave it out.
        keeps_first: a response is never read as nothing: its first position stays visible. Otherwise that holds only
            where nothing stands around it.
    """
    shape = (len(frames), max(frame.length for frame in frames))
    sample = embed(torch.zeros(0, dtype=torch.long, device=device))
    around = sample.new_zeros(*shape, sample.shape[1])
    response, first = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for i, frame in enumerate(frames):
        rows = embed(torch.tensor(frame.prefix + frame.suffix, dtype=torch.long, device=device))
        around[i, : frame.start], around[i, frame.stop : frame.length] = rows[: frame.start], rows[frame.start :]
        response[i, frame.start : frame.stop] = True
        first[i, frame.start] = keeps_first or not (frame.prefix or frame.suffix or frame.kept)
    index, length = torch.arange(shape[1]), torch.tensor([frame.length for frame in frames])[:, None]
    kept = torch.tensor([frame.kept for frame in frames])
    per_prompt = {
        "prompt": torch.arange(len(frames)),
        "valid": index < length,
        "response": response,
        "first": first,
        "positions": kept[:, None] + index.minimum(length - 1),
        "offset": torch.tensor([frame.start - start for frame, start in zip(frames, starts, strict=True)]),
    }
    per_copy = {name: x.repeat_interleave(num_trajectories, dim=0).to(device) for name, x in per_prompt.items()}
    return RewardSequences(frame=around, num_trajectories=num_trajectories, prefix=prefix, **per_copy)
