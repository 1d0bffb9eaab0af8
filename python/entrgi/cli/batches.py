"""Generations over many prompts: as many at once as the memory takes, each batch kept as soon as it is finished."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from entrgi import memory
from entrgi.cli.console import errors

if TYPE_CHECKING:
    from torch import Tensor

    from entrgi.config import SamplerConfig
    from entrgi.denoisers import Denoiser
    from entrgi.outputs import Output, StepState
    from entrgi.prompts import Prompt
    from entrgi.rewards import Reward

_INDEX = re.compile(r"prompts\[(\d+)\]")
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # torch on the CPU


@dataclass(frozen=True)
class Batch:
    """Prompts ``start`` to ``stop``, and what became of each run; ``error`` is what ended them early."""

    start: int
    stop: int
    outputs: dict[str, Output]
    error: BaseException | None = None


@dataclass(frozen=True)
class Work:
    """Generations of several configs over the same prompts.

    Attributes:
        runs: by name.
        seeds: int64 [B, N], of all trajectories.
        keep_steps: for a trace.
    """

    prompts: list[Prompt]
    runs: dict[str, SamplerConfig]
    denoiser: Denoiser
    reward: Reward
    seeds: Tensor
    keep_steps: bool

    def batch_size(self) -> int:
        """The smallest that one of the runs can have."""
        model = self.denoiser
        sizes = [
            memory.prompts_at_once(config, model.vocab_size, model.dtype.itemsize, model.device)
            for config in self.runs.values()
        ]
        return min(sizes)

    def check(self, size: int) -> None:
        """Raise ValueError for a prompt that no batch could hold, before any of them is generated for."""
        from entrgi.task import prepare

        if len(self.prompts) <= size:
            return  # generate itself looks at all of them first
        for config in self.runs.values():
            single = replace(config, num_return_sequences=1, best_of=None)
            for start in range(0, len(self.prompts), size):
                prompts = self.prompts[start : start + size]
                seeds = self.seeds[start : start + size, :1]
                with numbered_from(start):
                    prepare(
                        prompts,
                        self.denoiser,
                        self.reward,
                        single,
                        seed=None,
                        generator=None,
                        trajectory_seeds=seeds,
                        forbidden_ids=(),
                    )

    def batches(self, track: Callable[[str, int], Callable[[StepState], None]]) -> Iterator[Batch]:
        """Each batch when it is finished; the last one carries the error that ended it, if any.

        Args:
            track: given a run's name and its number of steps, a callback for their states.
        """
        size = self.batch_size()
        self.check(size)
        callbacks: dict[str, Callable[[StepState], None]] = {}
        start = finished = 0
        while start < len(self.prompts):
            stop = min(start + size, len(self.prompts))
            place = Place(finished, finished + -(-(len(self.prompts) - start) // size))
            outputs: dict[str, Output] = {}
            try:
                for name, config in self.runs.items():
                    if name not in callbacks:
                        callbacks[name] = track(name, place.total * config.steps)
                    outputs[name] = self.generate(name, start, stop, place.seen_by(callbacks[name]))
            except BaseException as error:
                if not (is_out_of_memory(error) and stop - start > 1):
                    if getattr(error, "partial", None) is not None:
                        outputs[name] = error.partial
                    yield Batch(start, stop, outputs, error)
                    return
                size = (stop - start) // 2
                errors.print(f"out of memory, going on with {size} prompts at once", style="dim", highlight=False)
            else:
                yield Batch(start, stop, outputs)
                start, finished = stop, finished + 1
                continue
            free_cache()  # not while the error holds the tensors of its frames

    def generate(self, name: str, start: int, stop: int, on_step: Callable[[StepState], None]) -> Output:
        import entrgi

        with numbered_from(start):
            return entrgi.generate(
                self.prompts[start:stop],
                self.denoiser,
                self.reward,
                self.runs[name],
                trajectory_seeds=self.seeds[start:stop],
                callback_on_step_end=on_step,
                output_history=self.keep_steps,
            )


@dataclass(frozen=True)
class Place:
    """Where a batch stands among those of its run."""

    before: int
    total: int

    def seen_by(self, on_step: Callable[[StepState], None]) -> Callable[[StepState], None]:
        """A callback that counts the steps of all batches as one row."""

        def shifted(state: StepState) -> None:
            on_step(replace(state, step=self.before * state.steps + state.step, steps=self.total * state.steps))

        return shifted


@contextmanager
def numbered_from(start: int) -> Iterator[None]:
    """Errors that name a prompt of a batch name its place among all prompts, the batch beginning at ``start``."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if error.args and isinstance(error.args[0], str):
            shifted = _INDEX.sub(lambda found: f"prompts[{int(found[1]) + start}]", error.args[0])
            error.args = (shifted, *error.args[1:])
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer prompts at once could do."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def free_cache() -> None:
    """Give back what a failed batch has left in torch's cache."""
    import torch

    with suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
