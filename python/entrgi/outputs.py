"""What a generation reports: per step to a callback, and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entrgi.guidance import GuidanceOutput
    from entrgi.positions import MaskedPositions
    from entrgi.schedule import Batch


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
        mapped: list[Any] = [function(value) if isinstance(value, Tensor) else value for value in values]
        return StepState(*mapped)


class StepRecord:
    """Collects what a step's batches did into tensors over all trajectories, for its :class:`StepState`."""

    def __init__(self, tokens: Tensor) -> None:
        self.shape = tokens.shape
        # One slot more than there are positions takes what padding rows write.
        nan = torch.full((tokens.numel() + 1,), torch.nan, dtype=torch.float32, device=tokens.device)
        self.entropy, self.weight = nan, nan.clone()
        self.committed = torch.zeros_like(nan, dtype=torch.bool)
        self.reward = nan[: self.shape[0]].clone()

    def add(
        self,
        batch: Batch,
        rows: MaskedPositions,
        entropy: Tensor,
        committed: Tensor,
        guided: GuidanceOutput | None,
    ) -> None:
        places = batch.active[rows.trajectories] * self.shape[1] + rows.columns
        places = torch.where(rows.real, places, self.entropy.shape[0] - 1)
        self.entropy[places] = entropy.float()
        self.committed[places] = committed
        if guided is not None:
            self.weight[places] = guided.weights[-1].float()
            self.reward[batch.active] = guided.rewards[-1].float()

    def state(self, index: int, steps: int, tokens: Tensor, seconds: float) -> StepState:
        entropy, weight, committed = (x[:-1].view(self.shape) for x in (self.entropy, self.weight, self.committed))
        return StepState(index, steps, tokens.clone(), committed, entropy, weight, self.reward, seconds)


@dataclass(frozen=True)
class History:
    """One entry per step that committed something, in order.

    Attributes:
        step: its index.
        committed: number of tokens committed, over the batch.
        reward: mean relaxed reward before the last optimiser step; None without guidance.
        weight: mean entropy weight w in that step over the masked positions; None without guidance.
        seconds: wall time on the host.
        trajectories, positions: how many numbers ``reward`` and ``weight`` are the means of.
    """

    step: list[int]
    committed: list[int]
    reward: list[float | None]
    weight: list[float | None]
    seconds: list[float]
    trajectories: list[int]
    positions: list[int]


class HistoryBuilder:
    """Collects the history of a generation on the device, which is asked once, at the end."""

    def __init__(self, keep_states: bool) -> None:
        self.states: list[StepState] | None = [] if keep_states else None
        self._steps: list[int] = []
        self._seconds: list[float] = []
        self._numbers: list[Tensor] = []  # fp64 [5] each: committed, reward, weight, and the means' counts

    def add(self, state: StepState) -> None:
        if self.states is not None:
            self.states.append(state.snapshot())
        self._steps.append(state.step)
        self._seconds.append(state.seconds)
        counts = ((~values.isnan()).sum() for values in (state.reward, state.weight))
        numbers = (state.committed.sum(), state.reward.nanmean(), state.weight.nanmean(), *counts)
        self._numbers.append(torch.stack([number.double() for number in numbers]))

    def history(self) -> History:
        """Waits for the device."""
        numbers = torch.stack(self._numbers).tolist() if self._numbers else []
        committed, reward, weight, trajectories, positions = zip(*numbers, strict=True) if numbers else ((),) * 5
        return History(
            step=list(self._steps),
            committed=list(map(int, committed)),
            reward=[None if math.isnan(x) else x for x in reward],
            weight=[None if math.isnan(x) else x for x in weight],
            seconds=list(self._seconds),
            trajectories=list(map(int, trajectories)),
            positions=list(map(int, positions)),
        )


@dataclass(frozen=True)
class Output:
    """What :func:`entrgi.generate` returns; everything is on the CPU.

    Attributes:
        sequences: int64 [B, K, S], the denoiser's ids with prompt and special tokens, padded on the right.
        texts: B lists of K, the decoded text up to the first token that ends it: prompt and response where the reward
            reads both as one plain text, otherwise the response alone.
        responses: B lists of K, the decoded response alone.
        rewards: fp32 [B, K], reward of each text; NaN where generation was interrupted.
        candidate_rewards: fp32 [B, N], rewards of all trajectories made, in the order of their seeds; N is K
            without ``best_of``.
        reward_parts: fp32 [B, K, n], of a weighted sum of n rewards each one's own, unweighted; None for others.
        seeds: int64 [B, K], the trajectory seeds; ``trajectory_seeds=`` reproduces them.
        windows: (start, stop) of the response in the columns of ``sequences``, one per prompt.
        history: per step, over all trajectories made.
        steps: with ``output_history`` every step's state, for the K trajectories returned; otherwise None.
        timings: seconds of ``denoise``, ``guide``, ``commit`` and ``score`` (on CUDA, of the device), and ``total`` on
            the host.
        complete: false in the partial output that an error or an interrupt carries.
    """

    sequences: Tensor
    texts: list[list[str]]
    responses: list[list[str]]
    rewards: Tensor
    candidate_rewards: Tensor
    reward_parts: Tensor | None
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


def concatenate(outputs: Sequence[Output], pad_token_id: int | None) -> Output:
    """Generations over consecutive prompts as one, their steps left out; a single one is itself."""
    if len(outputs) == 1:
        return outputs[0]
    width = max(output.sequences.shape[-1] for output in outputs)

    def widened(ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=pad_token_id or 0)

    def joined(name: str) -> list:
        return [item for output in outputs for item in getattr(output, name)]

    return Output(
        sequences=torch.cat([widened(output.sequences) for output in outputs]),
        texts=joined("texts"),
        responses=joined("responses"),
        rewards=torch.cat([output.rewards for output in outputs]),
        candidate_rewards=torch.cat([output.candidate_rewards for output in outputs]),
        reward_parts=_joined_parts([output.reward_parts for output in outputs]),
        seeds=torch.cat([output.seeds for output in outputs]),
        windows=joined("windows"),
        history=_sum([output.history for output in outputs]),
        steps=None,
        timings={name: sum(output.timings[name] for output in outputs) for name in outputs[0].timings},
        complete=all(output.complete for output in outputs),
    )


def _joined_parts(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _sum(histories: Sequence[History]) -> History:
    """The history of all: a step's counts and seconds are sums, its reward and weight means over all of them."""
    rows: dict[int, list[dict[str, Any]]] = {}
    names = [field.name for field in fields(History)]
    for history in histories:
        for values in zip(*(getattr(history, name) for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            rows.setdefault(row["step"], []).append(row)

    def mean(parts: list[dict[str, Any]], name: str, count: str) -> float | None:
        known = [part for part in parts if part[name] is not None]
        total = sum(part[count] for part in known)
        return sum(part[name] * part[count] for part in known) / total if total else None

    merged = History(**{name: [] for name in names})
    for step in sorted(rows):
        parts = rows[step]
        sums = {name: sum(part[name] for part in parts) for name in names if name not in ("step", "reward", "weight")}
        means = {"reward": mean(parts, "reward", "trajectories"), "weight": mean(parts, "weight", "positions")}
        for name, value in {"step": step, **sums, **means}.items():
            getattr(merged, name).append(value)
    return merged
