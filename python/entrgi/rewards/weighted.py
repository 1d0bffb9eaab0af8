"""A weighted sum of rewards, guided as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entrgi.prompts import Completion, Prompt
from entrgi.rewards.protocol import BoundReward, DeprecatedRows, Reward, check_bound, row_index
from entrgi.rewards.text import as_completions
from entrgi.sequences import Layout

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser


class WeightedReward:
    """``sum_i weights[i] * rewards[i]``, each model with its own format, vocabulary and context.

    A response position holds the rows of all models' embeddings side by side, so that guidance sees one reward with
    one embedding [V, d_1 + d_2 + ...] and its gradient is the exact gradient of the sum.

    Args:
        rewards: one or more, on the same device.
        weights: a finite number for each; they may be negative.

    Raises:
        ValueError: for no reward, another number of weights, a weight that is not finite, or several devices.

    Example:
        >>> import torch, entrgi, entrgi.demo
        >>> mood = entrgi.SequenceClassifierReward(*entrgi.demo.load_reward(torch.float32))
        >>> both = entrgi.WeightedReward([mood, mood], [0.75, 0.25])
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = tuple(rewards), tuple(weights)
        if not self.rewards:
            raise ValueError("rewards must hold at least one reward, got none")
        if len(self.rewards) != len(self.weights):
            raise ValueError(f"weights: got {len(self.weights)} for {len(self.rewards)} rewards, expected one for each")
        for index, weight in enumerate(self.weights):
            if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
                raise ValueError(f"weights[{index}] must be a finite number, got {weight!r}")
        devices = sorted({str(reward.device) for reward in self.rewards})
        if len(devices) > 1:
            raise ValueError(f"rewards: expected all on one device, got {' and '.join(devices)}")

    @property
    def reads_prompt(self) -> bool:
        """Whether all of them score prompt and response as one plain text."""
        return all(reward.reads_prompt for reward in self.rewards)

    @property
    def device(self) -> torch.device:
        return self.rewards[0].device

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(self, denoiser: Denoiser, layouts: Sequence[Layout], num_trajectories: int) -> BoundWeightedReward:
        """See :class:`entrgi.rewards.Reward`; errors are those of the rewards.

        Raises:
            ValueError: also where one reward's embedding is float64 and another's is not.
        """
        bound = tuple(check_bound(reward.bind(denoiser, layouts, num_trajectories)) for reward in self.rewards)
        dtypes = [child.embedding.dtype for child in bound]
        if len({dtype == torch.float64 for dtype in dtypes}) > 1:
            raise ValueError(f"rewards: embeddings are {', '.join(map(str, dtypes))}, expected float64 for all or none")
        dtype = reduce(torch.promote_types, dtypes)
        start = torch.tensor([layout.start for layout in layouts])
        length = torch.tensor([layout.window for layout in layouts])
        index = torch.arange(int(length.max()))
        width = max(layout.stop for layout in layouts)
        inside = index < length[:, None]
        parts = (start, inside, torch.where(inside, start[:, None] + index, width))
        start, inside, columns = (x.repeat_interleave(num_trajectories, dim=0).to(self.device) for x in parts)
        tables = [child.embedding.to(dtype) for child in bound]
        return BoundWeightedReward(
            embedding=tables[0] if len(tables) == 1 else torch.cat(tables, dim=1),
            children=bound,
            weights=tuple(map(float, self.weights)),
            start=start,
            inside=inside,
            columns=columns,
            width=width,
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """What each reward calls its model, in order."""
        return tuple(getattr(reward, "name", type(reward).__name__) for reward in self.rewards)

    def score(self, completions: Sequence[Completion | str | tuple[Prompt, str]] | str) -> Tensor:
        """See :meth:`entrgi.rewards.embedding.EmbeddingReward.score`."""
        return self.weigh(self.score_parts(completions))

    def score_parts(self, completions: Sequence[Completion | str | tuple[Prompt, str]] | str) -> Tensor:
        """Each reward's own, unweighted score of each text, fp32 [n, number of rewards]; see :meth:`score`."""
        completions = as_completions(completions)
        return torch.stack([reward.score(completions) for reward in self.rewards], dim=1)

    def weigh(self, parts: Tensor) -> Tensor:
        """Rewards [n] of what :meth:`score_parts` returns."""
        scores = [weight * part for weight, part in zip(self.weights, parts.unbind(dim=1), strict=True)]
        return torch.stack(scores).sum(dim=0)


@dataclass(frozen=True)
class BoundWeightedReward(DeprecatedRows):
    """See :class:`entrgi.rewards.BoundReward`. The buffer is the response window alone, [A, W, d_1 + d_2 + ...].

    Attributes:
        embedding: [V, d_1 + d_2 + ...].
        children, weights: the sum's terms.
        start: int64 [A], first column of the response window in the denoiser's sequence.
        inside: bool [A, W], columns of the buffer that belong to the window (windows differ in length).
        columns: int64 [A, W], their columns in the denoiser's sequence; ``width`` at the others.
        width: columns of the denoiser's sequence that hold all windows.
    """

    embedding: Tensor
    children: tuple[BoundReward, ...]
    weights: tuple[float, ...]
    start: Tensor
    inside: Tensor
    columns: Tensor
    width: int

    def select(self, active: Tensor) -> BoundWeightedReward:
        if active.shape[0] == self.start.shape[0]:
            return self
        return replace(
            self,
            children=tuple(child.select(active) for child in self.children),
            start=self.start[active],
            inside=self.inside[active],
            columns=self.columns[active],
        )

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ids = tokens.gather(1, self.columns.clamp_max(tokens.shape[1] - 1))
        return self.embedding[ids], ids

    def row_index(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        return trajectories * self.inside.shape[1] + positions - self.start[trajectories]

    def __call__(self, inputs_embeds: Tensor, ids: Tensor) -> Tensor:
        count = ids.shape[0]
        trajectories = torch.arange(count, device=ids.device)[:, None].expand_as(ids).reshape(-1)
        # One column past the end takes what lies outside a window.
        tokens = ids.new_zeros(count, self.width + 1).scatter(1, self.columns, ids)[:, :-1]
        parts = inputs_embeds.split([child.embedding.shape[1] for child in self.children], dim=-1)
        total: Any = 0.0
        for child, part, weight in zip(self.children, parts, self.weights, strict=True):
            with torch.no_grad():
                buffer, child_ids = child.inputs(tokens)
                positions = torch.where(self.inside, self.columns, self.start[:, None])
                rows = row_index(child, trajectories, positions.reshape(-1))
                rows = torch.where(self.inside.reshape(-1), rows, count * buffer.shape[1])
                flat = torch.cat([buffer.flatten(0, 1), buffer.new_zeros(1, buffer.shape[2])])
            filled = flat.index_copy(0, rows, part.flatten(0, 1).to(flat.dtype))
            total = total + weight * child(filled[:-1].view(buffer.shape), child_ids)
        return total
