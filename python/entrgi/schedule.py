"""How many positions each denoising step commits, and which ones compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import torch
from torch import Tensor

from entrgi.config import SamplerConfig
from entrgi_ext.reference import gumbel

# The third word of a random key: optimiser steps count from 0, these two draws come after them.
COMMIT_DRAW, POSITION_DRAW = -1, -2


@dataclass(frozen=True)
class Batch:
    """Trajectories that take a denoising step together. A memory budget divides a step into several.

    Attributes:
        trajectories: which ones, A of them, ascending.
        active: int64 [A], the same on the device.
        counts: int64 [A], how many positions each commits; with a threshold at least so many.
        competing: int64 [A], how many of each one's leading rows may be committed (the current block).
        splits: int64 [A + 1], where each one's rows begin among the N rows.
        rows: N, how many masked positions take part.
        chosen: bool [N] under ``alg="origin"``, the rows that commit; otherwise None.
    """

    trajectories: tuple[int, ...]
    active: Tensor
    counts: Tensor
    competing: Tensor
    splits: Tensor
    rows: int
    chosen: Tensor | None


@dataclass(frozen=True)
class Step:
    """One denoising step that commits something.

    Attributes:
        index: 0 ... T-1; it enters the random keys.
        guided: whether the logits are optimised.
        batches: disjoint trajectories, those in which the step commits something.
    """

    index: int
    guided: bool
    batches: list[Batch]


@cache
def time_ratios(schedule: str, steps: int) -> list[float]:
    """s / t of each of ``steps`` steps: the share of masked positions expected to stay masked."""
    if schedule == "paper":  # Dream, arXiv 2508.15487
        t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float32)
        return (t[1:] / t[:-1]).tolist()
    if schedule == "rgrl":
        t = torch.tensor([i / steps for i in range(steps, -1, -1)], dtype=torch.float32)
        unmasked = 1 - t
        return ((1 - unmasked[1:]) / (1 - unmasked[:-1])).tolist()
    return [1 - 1 / n for n in range(steps, 0, -1)]


def commit_count(schedule: str, left: int, step: int, steps: int) -> int:
    """How many of ``left`` masked positions step ``step`` of ``steps`` commits; all in the last.

    ``schedule`` is ``paper``, ``rgrl`` or ``uniform``.
    """
    if step == steps - 1:
        return left
    if schedule == "uniform":  # LLaDA, arXiv 2502.09992: the same number in every step, the first ones one more
        return -(-left // (steps - step))
    ratio = time_ratios(schedule, steps)[step]
    if schedule == "rgrl":
        return round(left * (1 - ratio))  # to nearest, halves to even
    share = 1 - torch.tensor(ratio, dtype=torch.float32)
    return int(torch.tensor(left, dtype=torch.float32) * share)


@dataclass
class _Progress:
    """How far one trajectory has come: its blocks, the current one, and the step within it."""

    blocks: list[int]
    steps: list[int]
    block: int = 0
    step: int = 0

    @classmethod
    def start(cls, masked: int, config: SamplerConfig, trajectory: int) -> _Progress:
        size = config.block_length or max(masked, 1)
        blocks = [min(size, masked - first) for first in range(0, masked, size)]
        n, t = len(blocks), config.steps
        if n > t:
            raise ValueError(
                f"steps must be at least the number of blocks, got {t} for {n} blocks of block_length {size} "
                f"(trajectory {trajectory} has {masked} masked positions)"
            )
        return cls(blocks, [t * (b + 1) // n - t * b // n for b in range(n)])

    def __post_init__(self) -> None:
        self.total, self.left = sum(self.blocks), self.blocks[0] if self.blocks else 0

    def count(self, config: SamplerConfig) -> int:
        """Commits of the coming step; with a threshold, the fewest."""
        if not self.total:
            return 0
        n = commit_count(config.schedule, self.left, self.step, self.steps[self.block])
        return n if config.threshold is None else max(n, 1)

    def chance(self, config: SamplerConfig) -> float:
        """Probability of a position's commit in the coming step under ``origin``."""
        steps = self.steps[self.block]
        return 1.0 if self.step == steps - 1 else 1 - time_ratios(config.schedule, steps)[self.step]

    def advance(self, committed: int, config: SamplerConfig) -> None:
        self.left -= committed
        self.total -= committed
        self.step += 1
        finished = self.step == self.steps[self.block] or (config.threshold is not None and self.left == 0)
        if finished and self.block + 1 < len(self.blocks):
            self.block, self.step = self.block + 1, 0
            self.left = min(self.blocks[self.block], self.total)


def plan(
    masked_columns: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: SamplerConfig,
    device: torch.device,
    count_masked: Callable[[], list[int]] | None = None,
) -> Iterator[Step]:
    """The steps that commit anything, in order.

    Trajectories that commit nothing in a step are left out of it: guidance would not change them. Without
    ``threshold`` and ``early_exit`` everything is known before the first step, and nobody asks the device.

    Args:
        masked_columns: the columns that are masked in each trajectory at the start.
        seeds: of the trajectories.
        count_masked: how many positions of each trajectory are masked now; called after each step has been
            carried out. None where that follows from the schedule alone.

    Raises:
        ValueError: where there are fewer steps than blocks, or one trajectory alone exceeds ``max_rows``.
    """
    progress = [_Progress.start(len(columns), config, p) for p, columns in enumerate(masked_columns)]
    for p, track in enumerate(progress):
        rows = track.total if config.guidance != "none" else track.left
        if config.max_rows is not None and config.padded(rows) > config.max_rows:
            padded = "" if config.bucket == 1 else f", {config.padded(rows)} with row_bucket {config.bucket}"
            raise ValueError(
                f"max_rows must be at least the {rows} masked positions of one trajectory (number {p}){padded}, "
                f"got {config.max_rows}"
            )
    return _steps(progress, [list(c) for c in masked_columns], seeds, config, device, count_masked)


def _steps(
    progress: list[_Progress],
    columns: list[list[int]],
    seeds: Sequence[int],
    config: SamplerConfig,
    device: torch.device,
    count_masked: Callable[[], list[int]] | None,
) -> Iterator[Step]:
    for j in range(config.steps):
        guided, turns = config.is_guided(j), []
        draws = _origin_draws(progress, columns, seeds, j, config) if config.alg == "origin" else [None] * len(progress)
        for p, (track, chosen) in enumerate(zip(progress, draws, strict=True)):
            count = track.count(config)
            if chosen is not None:
                columns[p] = [c for c, drawn in zip_longest(columns[p], chosen) if not drawn]
                count = sum(chosen)
            if count:
                # Guided, what does not compete now is optimised all the same, since the reward reads it.
                turns.append(_Turn(p, count, track.left, track.total if guided else track.left, chosen))
        if turns:
            yield Step(j, guided, [_batch(group, device) for group in _divide(turns, config)])
        committed = dict.fromkeys(range(len(progress)), 0) | {turn.trajectory: turn.count for turn in turns}
        if turns and count_masked is not None:
            committed = {p: progress[p].total - left for p, left in enumerate(count_masked())}
        for p, track in enumerate(progress):
            if track.total:
                track.advance(committed[p], config)


@dataclass(frozen=True)
class _Turn:
    """What one trajectory does in one step; fields as in :class:`Batch`."""

    trajectory: int
    count: int
    competing: int
    rows: int
    chosen: list[bool] | None


def _origin_draws(
    progress: list[_Progress], columns: list[list[int]], seeds: Sequence[int], step: int, config: SamplerConfig
) -> list[list[bool]]:
    """Which of each trajectory's competing columns commit, each by its own keyed draw.

    That is u < chance, written for u's Gumbel transform. One call makes the noise of all trajectories: its cost is
    that of its many small operations, not of the numbers.
    """
    competing = [own[: track.left] if track.total else [] for own, track in zip(columns, progress, strict=True)]
    keys = [[seed, step, POSITION_DRAW, c] for seed, own in zip(seeds, competing, strict=True) for c in own]
    noise = gumbel(torch.tensor(keys, dtype=torch.long).view(-1, 4), torch.zeros(1, dtype=torch.long))
    noise = iter(noise[:, 0].tolist())
    result = []
    for own, track in zip(competing, progress, strict=True):
        chance = track.chance(config) if own else 1.0
        limit = -math.inf if chance >= 1 else -math.log(-math.log1p(-chance))
        result.append([next(noise) > limit for _ in own])
    return result


def _divide(turns: list[_Turn], config: SamplerConfig) -> list[list[_Turn]]:
    """Whole trajectories in groups whose rows, padded to the bucket, are at most ``max_rows``."""
    groups, used = [[]], 0
    for turn in turns:
        if config.max_rows is not None and groups[-1] and config.padded(used + turn.rows) > config.max_rows:
            groups.append([])
            used = 0
        groups[-1].append(turn)
        used += turn.rows
    return groups


def _batch(turns: list[_Turn], device: torch.device) -> Batch:
    def to_device(values: list, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    splits, chosen = [0], []
    for turn in turns:
        splits.append(splits[-1] + turn.rows)
        chosen += (turn.chosen or []) + [False] * (turn.rows - len(turn.chosen or []))
    return Batch(
        trajectories=tuple(turn.trajectory for turn in turns),
        active=to_device([turn.trajectory for turn in turns]),
        counts=to_device([turn.count for turn in turns]),
        competing=to_device([turn.competing for turn in turns]),
        splits=to_device(splits),
        rows=splits[-1],
        chosen=None if turns[0].chosen is None else to_device(chosen, torch.bool),
    )
