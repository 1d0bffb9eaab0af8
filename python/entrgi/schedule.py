"""How many positions each denoising step commits, and the confidence that chooses which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entrgi_ext.ops import Sample


@dataclass(frozen=True)
class Step:
    """One denoising step that commits something, for the trajectories in which it does.

    Attributes:
        index: denoising step, 0 ... T-1; it enters the random keys.
        active: int64 [A], the trajectories that commit now, ascending.
        counts: int64 [A], how many positions each commits.
        splits: int64 [A + 1], where each one's rows begin among the N masked positions.
        masked: N, the number of masked positions of the active trajectories.
        total: how many are committed, the sum of ``counts``.
    """

    index: int
    active: Tensor
    counts: Tensor
    splits: Tensor
    masked: int
    total: int


def commit_counts(masked: int, steps: int) -> list[int]:
    """Positions committed in each of ``steps`` steps out of ``masked``: the published linear schedule.

    t_j = linspace(1, 1e-3, T + 1); step j commits int(n_masked * (1 - t_{j+1} / t_j)) of the n_masked
    still masked, the last step all of them. In fp32 like the published code (Dream, arXiv 2508.15487).
    With masked = steps = 128: 0 first, then 1 a step, 2 last.
    """
    t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float32)
    counts = []
    for j in range(steps - 1):
        n = int(torch.tensor(masked, dtype=torch.float32) * (1 - t[j + 1] / t[j]))
        counts.append(n)
        masked -= n
    return [*counts, masked]


def plan(masked: Sequence[int], steps: int, device: torch.device) -> list[Step]:
    """The steps that commit anything, for trajectories that start with ``masked[p]`` masked positions.

    Every count is known before the first step, so the loop never asks the device how far it has come.
    Trajectories that commit nothing in a step are left out of it: guidance would not change them.
    """
    memo = {n: commit_counts(n, steps) for n in set(masked)}
    left, result = list(masked), []
    for j in range(steps):
        counts = [memo[n][j] for n in masked]
        active = [p for p, n in enumerate(counts) if n > 0]
        if active:
            rows = [0]
            for p in active:
                rows.append(rows[-1] + left[p])
            as_tensor = [active, [counts[p] for p in active], rows]
            tensors = [torch.tensor(x, dtype=torch.long).to(device, non_blocking=True) for x in as_tensor]
            result.append(Step(j, *tensors, masked=rows[-1], total=sum(counts)))
        left = [n - c for n, c in zip(left, counts, strict=True)]
    return result


def confidence(alg: str, sample: Sample, logits: Tensor, initial_entropy: Tensor, entropy_source: str) -> Tensor:
    """Confidence [N] of committing ``sample.token`` at each of N positions; higher commits earlier.

    Args:
        alg: see :class:`entrgi.config.SamplerConfig`.
        sample: the commit draw from the optimised logits.
        logits: [N, V], the optimised logits.
        initial_entropy: [N], entropy in nats of the denoiser's own logits at tau, unfiltered.
        entropy_source: ``initial`` or ``filtered``, for ``alg="entropy"``.

    Raises:
        ValueError: for an unknown ``alg`` or ``entropy_source``.
    """
    if alg == "entropy" and entropy_source == "initial":
        return -initial_entropy
    if alg == "entropy" and entropy_source == "filtered":
        return -sample.filtered_entropy
    if alg == "maskgit_plus":
        return sample.probability
    if alg == "topk_margin":
        return sample.margin
    if alg == "anchor":
        drawn = logits.gather(1, sample.token.clamp(min=0)[:, None])[:, 0]
        return drawn.to(sample.probability.dtype)
    raise ValueError(f"alg {alg!r} with entropy_source {entropy_source!r} is not a confidence rule")
