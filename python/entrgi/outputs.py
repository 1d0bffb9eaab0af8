"""What a generation reports: per step to a callback, and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepState:
    """A denoising step that committed something; tensors are on the device, and not to be changed.

    P trajectories, prompt by prompt; S columns of the denoiser's sequence.

    Attributes:
        step: index of the step, 0 ... steps - 1. Steps that commit nothing are skipped.
        steps: T.
        tokens: int64 [P, S], all trajectories after the commit.
        committed: bool [P, S], what this step committed.
        entropy: fp32 [P, S], entropy in nats at tau of the denoiser's own logits; NaN where a position was not
            masked, its trajectory waited, or (unguided) its block did.
        weight: fp32 [P, S], entropy weight w in the last optimiser step; NaN there too, and without guidance.
        reward: fp32 [P], relaxed reward before the last optimiser step; NaN where there was none.
        seconds: wall time of the step on the host (on CUDA: until its work was queued).
    """

    step: int
    steps: int
    tokens: Tensor
    committed: Tensor
    entropy: Tensor
    weight: Tensor
    reward: Tensor
    seconds: float

    def snapshot(self) -> StepState:
        """The same with tensors of its own on the CPU. Waits for the device."""
        return self._map(lambda tensor: tensor.to("cpu", copy=True))

    def select(self, trajectories: Tensor) -> StepState:
        """The trajectories in ``trajectories``, int64 [n]."""
        return self._map(lambda tensor: tensor[trajectories])

    def _map(self, function: Callable[[Tensor], Tensor]) -> StepState:
        values = [getattr(self, field.name) for field in fields(self)]
        return StepState(*[function(value) if isinstance(value, Tensor) else value for value in values])


@dataclass(frozen=True)
class History:
    """One entry per step that committed something, in order.

    Attributes:
        step: its index.
        committed: number of tokens committed, over the batch.
        reward: mean relaxed reward before the last optimiser step; None without guidance.
        weight: mean entropy weight w in that step over the masked positions; None without guidance.
        seconds: wall time on the host.
    """

    step: list[int]
    committed: list[int]
    reward: list[float | None]
    weight: list[float | None]
    seconds: list[float]


class HistoryBuilder:
    """Collects the history of a generation on the device, which is asked once, at the end."""

    def __init__(self, keep_states: bool) -> None:
        self.states: list[StepState] | None = [] if keep_states else None
        self._steps: list[int] = []
        self._seconds: list[float] = []
        self._numbers: list[Tensor] = []  # fp64 [3] each: committed, reward, weight

    def add(self, state: StepState) -> None:
        if self.states is not None:
            self.states.append(state.snapshot())
        self._steps.append(state.step)
        self._seconds.append(state.seconds)
        numbers = (state.committed.sum(), state.reward.nanmean(), state.weight.nanmean())
        self._numbers.append(torch.stack([number.double() for number in numbers]))

    def history(self) -> History:
        """Waits for the device."""

        numbers = torch.stack(self._numbers).tolist() if self._numbers else []
        return History(
            step=list(self._steps),
            committed=[int(committed) for committed, _, _ in numbers],
            reward=[None if math.isnan(reward) else reward for _, reward, _ in numbers],
            weight=[None if math.isnan(weight) else weight for _, _, weight in numbers],
            seconds=list(self._seconds),
        )


@dataclass(frozen=True)
class Output:
    """What :func:`entrgi.generate` returns; everything is on the CPU.

    Attributes:
        sequences: int64 [B, K, S], the denoiser's ids with prompt and special tokens, padded on the right.
        texts: [B][K], the decoded text that is scored, up to the first end-of-sequence token: prompt and
            response where the reward reads both as one plain text, otherwise the response alone.
        responses: [B][K], the decoded response alone.
        rewards: fp32 [B, K], reward of each text; NaN where generation was interrupted.
        candidate_rewards: fp32 [B, N], rewards of all trajectories made, in the order of their seeds; N is K
            without ``best_of``.
        seeds: int64 [B, K], the trajectory seeds; ``trajectory_seeds=`` reproduces them.
        windows: (start, stop) of the response in the columns of ``sequences``, one per prompt.
        history: per step, over all trajectories made.
        steps: with ``output_history`` every step's state, for the K trajectories returned; otherwise None.
        timings: seconds on the host: ``denoise``, ``guide``, ``commit``, ``score``, ``total``.
        complete: false in the partial output that an interrupt carries.
    """

    sequences: Tensor
    texts: list[list[str]]
    responses: list[list[str]]
    rewards: Tensor
    candidate_rewards: Tensor
    seeds: Tensor
    windows: list[tuple[int, int]]
    history: History
    steps: list[StepState] | None
    timings: dict[str, float]
    complete: bool

    @property
    def top1(self) -> Tensor:
        """Top@1: the best reward of each prompt, fp32 [B]."""
        return self.rewards.amax(dim=1)

    @property
    def avg(self) -> Tensor:
        """Avg@N: the mean reward of each prompt, fp32 [B]."""
        return self.rewards.mean(dim=1)
