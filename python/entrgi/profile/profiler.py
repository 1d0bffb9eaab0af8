"""Measures a guided generation part by part and sets every part against its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import Unpack

from entrgi.config import SamplerConfig, SamplerOptions, resolve
from entrgi.denoisers import Denoiser
from entrgi.matmul import onednn_matmul
from entrgi.outputs import StepState
from entrgi.profile.rates import Rates, measure_rates
from entrgi.profile.work import Work, WorkCounter
from entrgi.prompts import Prompt
from entrgi.rewards import Reward
from entrgi.sampler import generate
from entrgi.timing import Recorder, StepTimes

IDLE = "idle"
ORDER = (
    *("denoiser", "reward forward", "reward backward"),
    *("sample_tokens", "logit_statistics", "gumbel_perturb", "relaxed_embedding", "logit_update", "commit", IDLE),
)


@dataclass(frozen=True)
class Part:
    """One part of a denoising step; numbers are means over the profiled steps, so that parts add up to the step.

    Attributes:
        name: as in :data:`ORDER`. ``idle`` is what of the step lies outside all parts: small tensor operations,
            Python, and on CUDA the device's waiting for them.
        calls: per step.
        seconds: per step.
        share: of the step's seconds.
        floor: seconds per step in which the machine could do it, None for ``idle``: see :mod:`entrgi.profile.work`.
        bound: which of ``bytes`` and ``flops`` sets most of the floor; None for ``idle``.
        ratio: seconds over floor; None for ``idle`` and where there is nothing to do.
        bytes, flops: behind the floor, per step.
    """

    name: str
    calls: float
    seconds: float
    share: float
    floor: float | None
    bound: str | None
    ratio: float | None
    bytes: float
    flops: float


@dataclass(frozen=True)
class StepProfile:
    """One denoising step, in seconds; ``sum(parts.values()) == seconds``, ``idle`` being one of them.

    Attributes:
        index: of the steps made, from 0.
        rows: N, masked positions worked on.
        host_seconds: in which the host carried the step out; on CUDA, in which it queued it.
        floors: of every part but ``idle``.
    """

    index: int
    rows: int
    seconds: float
    host_seconds: float
    parts: dict[str, float]
    floors: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` returns.

    Attributes:
        parts: in the order of :data:`ORDER`, ``idle`` last.
        seconds: of a mean step.
        floor: sum of the parts' floors.
        steps: every profiled step.
        rates: of this machine, measured in the same run.
        shapes: trajectories P, width V of the logits, width d of the embeddings, dtypes and bytes of parameters
            that take part, as far as they occurred.
        repeats: generations measured; of every step the one of median duration counts.
    """

    parts: list[Part]
    seconds: float
    floor: float
    steps: list[StepProfile]
    rates: Rates
    shapes: dict[str, Any]
    repeats: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


class _Enough(Exception):
    """Ends a generation whose further steps are not profiled."""


def profile(
    prompts: Prompt | Sequence[Prompt],
    denoiser: Denoiser,
    reward: Reward,
    config: SamplerConfig | str | None = None,
    *,
    seed: int = 0,
    first_steps: int | None = None,
    repeats: int = 3,
    on_step: Callable[[str], object] | None = None,
    **options: Unpack[SamplerOptions],
) -> Profile:
    """Run the same generation several times: once to count its work, then, after a step to warm up, ``repeats`` times
    to measure it, of which the median counts.

    CUDA graphs are switched off, since the parts of a graph cannot be told apart; what they save is ``idle`` and the
    device's waiting inside the parts. Masked positions become fewer from step to step, and so do the costs: a profile
    of the first steps shows the most expensive ones.

    Args:
        prompts, denoiser, reward, config, options: as for :func:`entrgi.generate`.
        seed: of the trajectories.
        first_steps: how many denoising steps to profile; None: all.
        repeats: >= 1.
        on_step: called after every step with ``counting``, ``warming up`` or ``measuring``.

    Returns:
        :class:`Profile`.

    Raises:
        ValueError: for ``repeats`` or ``first_steps`` below 1, and as :func:`entrgi.generate`.
        RuntimeError: where the generation does not repeat itself, so that work and times do not belong together.

    Example:
        >>> result = profile("The movie was", denoiser, reward, max_new_tokens=16, steps=16)
        >>> {part.name: part.ratio for part in result.parts}
    """
    for name, value in (("repeats", repeats), ("first_steps", first_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    config = resolve(config, options)
    config = replace(config, cuda_graphs=False, row_bucket=config.bucket)

    def run(activity: str, recorder: Recorder, last: int | None = first_steps) -> None:
        made = 0

        def count(_state: StepState) -> None:
            nonlocal made
            made += 1
            if on_step is not None:
                on_step(activity)
            if made == last:
                raise _Enough

        with recorder, suppress(_Enough):
            generate(prompts, denoiser, reward, config, seed=seed, callback_on_step_end=count)

    counter = WorkCounter()
    with _uncompiled():
        run("counting", counter)
    run("warming up", Recorder(denoiser.device), last=1)  # compiled models compile now
    measured = []
    for _ in range(repeats):
        recorder = Recorder(denoiser.device)
        run("measuring", recorder)
        measured.append(recorder.steps())
    steps = [sorted(same, key=lambda step: step.seconds)[repeats // 2] for same in zip(*measured, strict=True)]
    _check_same(counter.counted, steps)

    dtypes = {name for step in counter.counted for work in step for name in work.flops}
    with onednn_matmul(denoiser.device):  # as in the generations
        rates = measure_rates(denoiser.device, [getattr(torch, name) for name in sorted(dtypes)], working_set(counter))
    profiles = [_step_profile(times, work, rates) for times, work in zip(steps, counter.counted, strict=True)]
    return _summary(profiles, steps, counter, rates, repeats)


def working_set(counter: WorkCounter) -> int:
    """Bytes that a step goes through: all parameters, E, and the largest z with Adam's moments."""
    calls = [call for step in counter.counted for work in step for call in work.calls]
    table = max(
        (c.vocabulary * c.width * getattr(torch, c.embedding).itemsize for c in calls if c.embedding), default=0
    )
    logits = max(
        (c.rows * c.vocabulary * (getattr(torch, c.logits).itemsize + 8) for c in calls if c.logits), default=0
    )
    return counter.parameter_bytes + table + logits


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled code would hide its operations from the counter."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _check_same(counted: list[list[Work]], steps: list[StepTimes]) -> None:
    def calls(names: Iterator[str]) -> dict[str, int]:
        result: dict[str, int] = {}
        for name in names:
            result[name] = result.get(name, 0) + 1
        return result

    if len(counted) != len(steps):
        raise RuntimeError(f"profile: {len(counted)} steps were counted and {len(steps)} measured with the same seed")
    for index, (works, times) in enumerate(zip(counted, steps, strict=True)):
        expected = calls(work.name for work in works)
        found = {name: span.calls for name, span in times.spans.items()}
        if expected != found:
            raise RuntimeError(f"profile: step {index} was counted as {expected} and measured as {found}")


def _step_profile(times: StepTimes, works: list[Work], rates: Rates) -> StepProfile:
    floors = dict.fromkeys(times.spans, 0.0)
    for work in works:
        floors[work.name] += rates.seconds(work.bytes, work.flops)[0]
    rows = sum(call.rows for work in works for call in work.calls if call.name == "commit_")
    parts = {name: span.total for name, span in times.spans.items()} | {IDLE: times.idle}
    return StepProfile(times.index, rows, times.seconds, times.host_seconds, parts, floors)


def _summary(
    profiles: list[StepProfile], steps: list[StepTimes], counter: WorkCounter, rates: Rates, repeats: int
) -> Profile:
    count = len(profiles)
    seconds = sum(step.seconds for step in profiles) / count
    names = {name for step in profiles for name in step.parts}
    parts = []
    for name in sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER) - 1.5, name)):
        spent = sum(step.parts.get(name, 0.0) for step in profiles) / count
        works = [work for step in counter.counted for work in step if work.name == name]
        floor = sum(step.floors.get(name, 0.0) for step in profiles) / count
        bounds = {"bytes": 0.0, "flops": 0.0}
        for work in works:
            least, bound = rates.seconds(work.bytes, work.flops)
            bounds[bound] += least
        parts.append(
            Part(
                name=name,
                calls=sum(step.spans[name].calls for step in steps if name in step.spans) / count,
                seconds=spent,
                share=spent / seconds,
                floor=None if name == IDLE else floor,
                bound=None if name == IDLE else max(bounds, key=lambda which: bounds[which]),
                ratio=spent / floor if floor else None,
                bytes=sum(work.bytes for work in works) / count,
                flops=sum(sum(work.flops.values()) for work in works) / count,
            )
        )
    floor = sum(part.floor for part in parts if part.floor is not None)
    return Profile(parts, seconds, floor, profiles, rates, _shapes(counter), repeats)


def _shapes(counter: WorkCounter) -> dict[str, Any]:
    calls = [call for step in counter.counted for work in step for call in work.calls]
    rows = [sum(c.rows for work in step for c in work.calls if c.name == "commit_") for step in counter.counted]
    logits = next(call for call in calls if call.logits)
    embedding = next((call for call in calls if call.embedding), None)
    return {
        "N": rows,
        "V": logits.vocabulary,
        "d": embedding and embedding.width,
        "logits": logits.logits,
        "embedding": embedding and embedding.embedding,
        "parameter_bytes": counter.parameter_bytes,
    }
