"""Traces: what happened in every denoising step of one or several runs, as lines of JSON.

    {"kind": "header", "format": "entrgi-trace", "version": 1, "prompts": [...], "runs": [...], ...}
    {"kind": "step", "run": "entrgi", "step": 0, "seconds": 0.02, "trajectories": [
        {"prompt": 0, "trajectory": 2, "reward": 1.31, "columns": [0, 1, 2], "entropy": [...], "weight": [...],
         "commits": [[1, " good"]]}]}
    {"kind": "end", "run": "entrgi", "complete": true, "results": [{"texts": [...], "rewards": [...], ...}], ...}

A header, then for each run its steps in order and its end. Columns count from the start of the prompt's window, the
response (from the first mask token of a prompt that is infilled). ``columns`` are those masked before the step,
``entropy`` (nats, of the denoiser's own distribution at the temperature) and ``weight`` (entropy weight w of the last
optimiser step; null where the step was not guided) go with them; ``reward`` is the relaxed one before the last update.
Entropies, weights and rewards have four decimals, and are null where there is none. Seeds are texts, since many
readers of JSON keep 53 bits of a number. Reading needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi.files import write_text

if TYPE_CHECKING:
    from entrgi.prompts import Prompt

FORMAT, VERSION = "entrgi-trace", 1


@dataclass(frozen=True)
class TrajectoryStep:
    """One trajectory in one step; its fields are those of the file."""

    prompt: int
    trajectory: int
    reward: float | None
    columns: list[int]
    entropy: list[float | None]
    weight: list[float | None] | None
    commits: list[tuple[int, str]]


@dataclass(frozen=True)
class TraceStep:
    """One denoising step of a run: ``step`` is its index, ``seconds`` its wall time on the host."""

    step: int
    seconds: float
    trajectories: list[TrajectoryStep]


@dataclass(frozen=True)
class Result:
    """What became of one prompt: lists over its trajectories; rewards are None where there is none."""

    texts: list[str]
    responses: list[str]
    rewards: list[float | None]
    seeds: list[int]


@dataclass(frozen=True)
class Run:
    """One generation."""

    name: str
    config: dict[str, Any]
    steps: list[TraceStep]
    complete: bool
    results: list[Result]
    seconds: float


@dataclass(frozen=True)
class TracedPrompt:
    """One prompt: text or messages, the width of its window, and what the window holds from the start."""

    prompt: Prompt
    width: int
    given: list[tuple[int, str]]


@dataclass(frozen=True)
class Trace:
    """One or several runs over the same prompts.

    Attributes:
        source: where the runs come from: models, device, seed; plain data.
        special: pieces that are special tokens.
        prompts: B.
        copies: K, trajectories per prompt.
        runs: in the order in which they were made.
    """

    source: dict[str, Any]
    special: list[str]
    prompts: list[TracedPrompt]
    copies: int
    runs: list[Run]


def lines(trace: Trace) -> Iterator[dict[str, Any]]:
    """The lines of the file, as plain data."""
    yield {
        "kind": "header",
        "format": FORMAT,
        "version": VERSION,
        "source": trace.source,
        "special": trace.special,
        "copies": trace.copies,
        "prompts": [vars(prompt) for prompt in trace.prompts],
        "runs": [{"name": run.name, "config": run.config} for run in trace.runs],
    }
    for run in trace.runs:
        for step in run.steps:
            parts = [vars(part) for part in step.trajectories]
            yield {"kind": "step", "run": run.name, "step": step.step, "seconds": step.seconds, "trajectories": parts}
        results = [{**vars(result), "seeds": list(map(str, result.seeds))} for result in run.results]
        end = {"complete": run.complete, "results": results, "seconds": run.seconds}
        yield {"kind": "end", "run": run.name, **end}


def write(path: Path, trace: Trace) -> None:
    """Write the file as a whole: it appears, or replaces an older one, when all of it is there."""
    rows = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines(trace))
    write_text(path, "".join(f"{row}\n" for row in rows))
