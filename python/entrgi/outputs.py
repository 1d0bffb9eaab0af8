"""What a generation reports: per step to a callback, and at the end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepState:
    """What ``callback_on_step_end`` gets after a step that committed something; tensors are on the device.

    Attributes:
        step: index of the step, 0 ... steps - 1. Steps that commit nothing are skipped.
        steps: T.
        tokens: int64 [P, S], all trajectories after the commit; not to be changed.
        committed: number of tokens committed in this step, over the batch.
        reward: mean relaxed reward before the last Adam update, 0-dim; None without guidance.
        weight: mean entropy weight w in that update, 0-dim; None without guidance.
        seconds: wall time of the step on the host (on CUDA: until its work was queued).
    """

    step: int
    steps: int
    tokens: Tensor
    committed: int
    reward: Tensor | None
    weight: Tensor | None
    seconds: float


@dataclass(frozen=True)
class History:
    """One entry per step that committed something, in order; fields as in :class:`StepState`."""

    step: list[int]
    committed: list[int]
    reward: list[float | None]
    weight: list[float | None]
    seconds: list[float]

    @classmethod
    def of(cls, states: list[StepState]) -> History:
        """Waits for the device."""
        return cls(
            step=[s.step for s in states],
            committed=[s.committed for s in states],
            reward=[None if s.reward is None else s.reward.item() for s in states],
            weight=[None if s.weight is None else s.weight.item() for s in states],
            seconds=[s.seconds for s in states],
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
        seeds: int64 [B, K], the trajectory seeds; ``trajectory_seeds=`` reproduces them.
        history: per step.
        timings: seconds on the host: ``denoise``, ``guide``, ``commit``, ``score``, ``total``.
        complete: false in the partial output that an interrupt carries.
    """

    sequences: Tensor
    texts: list[list[str]]
    responses: list[list[str]]
    rewards: Tensor
    seeds: Tensor
    history: History
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
