"""From the tensors of a generation to its trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from entrgi.trace.schema import Result, Run, Trace, TracedPrompt, TraceStep, TrajectoryStep

if TYPE_CHECKING:
    from entrgi.config import SamplerConfig
    from entrgi.denoisers import Denoiser
    from entrgi.outputs import Output, StepState
    from entrgi.prompts import Prompt

DECIMALS = 4


def record(
    prompts: Sequence[Prompt],
    runs: Mapping[str, tuple[SamplerConfig, Output]],
    denoiser: Denoiser,
    source: Mapping[str, Any],
) -> Trace:
    """The trace of finished or interrupted generations over the same prompts.

    Args:
        prompts: as given to :func:`entrgi.generate`.
        runs: by name, the config and the output, made with ``output_history=True``.
        denoiser: the one that made them.
        source: plain data to describe where they come from.

    Raises:
        ValueError: without runs, for one without its history, or for runs of different shapes.
    """
    if not runs:
        raise ValueError("runs: expected at least one")
    shapes = {name: (list(output.windows), output.rewards.shape) for name, (_, output) in runs.items()}
    for name, shape in shapes.items():
        if runs[name][1].steps is None:
            raise ValueError(f"runs[{name!r}] has no steps, expected a generation with output_history=True")
        if shape != next(iter(shapes.values())):
            raise ValueError(f"runs[{name!r}] has other windows or another number of trajectories than the first run")
    recorders = {name: _Recorder(output, prompts, denoiser) for name, (_, output) in runs.items()}
    first = next(iter(recorders.values()))
    return Trace(
        source={"entrgi": metadata.version("entrgi"), **source},
        special=sorted(set().union(*(recorder.special for recorder in recorders.values()))),
        prompts=[
            TracedPrompt(plain_prompt(prompt), stop - start, first.given(b))
            for b, (prompt, (start, stop)) in enumerate(zip(prompts, first.output.windows, strict=True))
        ],
        copies=first.copies,
        runs=[
            Run(
                name=name,
                config=plain_options(config),
                steps=[recorders[name].step(state) for state in output.steps or ()],
                complete=output.complete,
                results=_results(output),
                seconds=round(output.timings["total"], 6),
            )
            for name, (config, output) in runs.items()
        ],
    )


def concatenate(traces: Sequence[Trace]) -> Trace:
    """Traces over consecutive prompts as one. A run that some of them lack (it was not begun) has empty texts there."""
    if len(traces) == 1:
        return traces[0]
    names = list(dict.fromkeys(run.name for trace in traces for run in trace.runs))
    return Trace(
        source=traces[0].source,
        special=sorted(set().union(*(trace.special for trace in traces))),
        prompts=[prompt for trace in traces for prompt in trace.prompts],
        copies=traces[0].copies,
        runs=[_joined(name, traces) for name in names],
    )


def _joined(name: str, traces: Sequence[Trace]) -> Run:
    steps: dict[int, TraceStep] = {}
    results: list[Result] = []
    found = [next((run for run in trace.runs if run.name == name), None) for trace in traces]
    for run, trace in zip(found, traces, strict=True):
        offset = len(results)
        for step in run.steps if run else ():
            before = steps.get(step.step, TraceStep(step.step, 0.0, []))
            parts = [replace(part, prompt=part.prompt + offset) for part in step.trajectories]
            seconds = round(before.seconds + step.seconds, 6)
            steps[step.step] = TraceStep(step.step, seconds, [*before.trajectories, *parts])
        nothing = [""] * trace.copies
        blank = [Result(nothing, nothing, [None] * trace.copies, each.seeds) for each in trace.runs[0].results]
        results += run.results if run else blank
    first = next(run for run in found if run is not None)
    return Run(
        name=name,
        config=first.config,
        steps=[steps[index] for index in sorted(steps)],
        complete=all(run is not None and run.complete for run in found),
        results=results,
        seconds=round(sum(run.seconds for run in found if run is not None), 6),
    )


class _Recorder:
    """Turns a run's tensors into columns and pieces; its steps are to be asked for in order."""

    def __init__(self, output: Output, prompts: Sequence[Prompt], denoiser: Denoiser) -> None:
        from entrgi.vocabulary.pieces import sequence_pieces  # not above: reading a trace needs no torch

        self.output, self.mask = output, denoiser.mask_token_id
        self.copies = output.sequences.shape[1]
        self.windows = [window for window in output.windows for _ in range(self.copies)]
        special_ids = set(denoiser.tokenizer.all_special_ids) - {self.mask}
        self.special: set[str] = set()
        self.pieces: list[list[str]] = []
        for (start, stop), row in zip(self.windows, output.sequences.flatten(0, 1).tolist(), strict=True):
            ids = row[start:stop]
            pieces = sequence_pieces(denoiser.tokenizer, ids)
            self.special |= {piece for piece, token_id in zip(pieces, ids, strict=True) if token_id in special_ids}
            self.pieces.append(pieces)
        holes = [_holes(denoiser, prompt, window) for prompt, window in zip(prompts, output.windows, strict=True)]
        self.masked = [columns for columns in holes for _ in range(self.copies)]

    def given(self, prompt: int) -> list[tuple[int, str]]:
        """Columns that the prompt itself fills; to be asked for before the first step."""
        p = prompt * self.copies
        holes = set(self.masked[p])
        return [(c, piece) for c, piece in enumerate(self.pieces[p]) if c not in holes]

    def step(self, state: StepState) -> TraceStep:
        tokens, entropy, weight = (x.tolist() for x in (state.tokens, state.entropy, state.weight))
        rewards = state.reward.tolist()
        trajectories = []
        for p, (start, _) in enumerate(self.windows):
            columns = self.masked[p]
            # Not state.committed: with early_exit the masks behind an end of sequence are filled, too.
            left = [c for c in columns if tokens[p][start + c] == self.mask]
            nats = [_number(entropy[p][start + c]) for c in columns]
            if left == columns and all(x is None for x in nats):
                continue  # took no part in this step
            weights = [_number(weight[p][start + c]) for c in columns]
            trajectories.append(
                TrajectoryStep(
                    prompt=p // self.copies,
                    trajectory=p % self.copies,
                    reward=_number(rewards[p]),
                    columns=columns,
                    entropy=nats,
                    weight=None if all(x is None for x in weights) else weights,
                    commits=[(c, self.pieces[p][c]) for c in columns if tokens[p][start + c] != self.mask],
                )
            )
            self.masked[p] = left
        return TraceStep(state.step, round(state.seconds, 6), trajectories)


def _holes(denoiser: Denoiser, prompt: Prompt, window: tuple[int, int]) -> list[int]:
    """Columns of the window that start masked: all but what a prompt with masks of its own has between them."""
    encoded = denoiser.encode(prompt)
    row = [*encoded.prefix, *encoded.body]
    start, stop = window
    return [s - start for s in range(start, stop) if s >= len(row) or row[s] == denoiser.mask_token_id]


def _results(output: Output) -> list[Result]:
    return [
        Result(texts, responses, [_number(x) for x in rewards], seeds)
        for texts, responses, rewards, seeds in zip(
            output.texts, output.responses, output.rewards.tolist(), output.seeds.tolist(), strict=True
        )
    ]


def plain_options(config: SamplerConfig) -> dict[str, Any]:
    """The config as plain data: a dtype becomes its name."""
    options = asdict(config)
    return {**options, "logits_dtype": config.logits_dtype and str(config.logits_dtype).removeprefix("torch.")}


def plain_prompt(prompt: Prompt) -> Prompt:
    """A prompt whose contents are texts: parts of a content are joined, and no content is the empty text."""
    if isinstance(prompt, str):
        return prompt
    return [{**message, "content": _plain_content(message["content"])} for message in prompt]


def _plain_content(content: object) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)


def _number(value: float) -> float | None:
    return round(value, DECIMALS) if math.isfinite(value) else None
