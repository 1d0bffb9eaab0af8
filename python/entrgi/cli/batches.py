"""Generations over many prompts: as many at once as the memory takes, each batch kept as soon as it is finished."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

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
        places: of the prompts among all that were given.
        runs: by name.
        seeds: int64 [B, N], of all trajectories.
        keep_steps: for a trace.
    """

    prompts: list[Prompt]
    places: list[int]
    runs: dict[str, SamplerConfig]
    denoiser: Denoiser
    reward: Reward | None
    seeds: Tensor
    keep_steps: bool

    def batch_size(self) -> int:
        """How many prompts at once, by the longest of them; the smallest that one of the runs can have."""
        model = self.denoiser
        encoded = [model.encode(prompt) for prompt in self.prompts]
        length = max(len(ids.prefix) + len(ids.body) + len(ids.suffix) for ids in encoded)
        holes = max(ids.body.count(model.mask_token_id) for ids in encoded)
        sizes = []
        for config in self.runs.values():
            masked = config.max_new_tokens + (holes if config.infill else 0)
            sized = replace(config, max_new_tokens=max(masked, 1))
            shape = (model.vocab_size, model.dtype.itemsize, model.device)
            sizes.append(memory.prompts_at_once(sized, length + config.max_new_tokens, *shape))
        return min(sizes)

    def check(self, size: int) -> None:
        """Raise ValueError for a prompt that no batch could hold, before any of them is generated for."""
        from entrgi.generation import prepare

        if len(self.prompts) <= size:
            return  # generate itself looks at all of them first
        config = list(self.runs.values())[-1]  # the runs differ in what they do to the prompts, not in what they take
        single = replace(config, num_return_sequences=1, best_of=None)
        for start in range(0, len(self.prompts), size):
            with numbered(self.places[start:]):
                prepare(
                    self.prompts[start : start + size],
                    self.denoiser,
                    self.reward,
                    single,
                    seed=None,
                    generator=None,
                    trajectory_seeds=self.seeds[start : start + size, :1],
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
                    partial = getattr(error, "partial", None)
                    if partial is not None:
                        outputs[name] = partial
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

        with numbered(self.places[start:]):
            output = entrgi.generate(
                self.prompts[start:stop],
                self.denoiser,
                self.reward,
                self.runs[name],
                trajectory_seeds=self.seeds[start:stop],
                callback_on_step_end=on_step,
                output_history=self.keep_steps,
            )
        return cast("Output", output)  # not the ids alone


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
def numbered(places: list[int]) -> Iterator[None]:
    """Errors that name a prompt of a batch by its number name its place among all that were given."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if error.args and isinstance(error.args[0], str):
            shifted = _INDEX.sub(lambda found: f"prompts[{places[int(found[1])]}]", error.args[0])
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
