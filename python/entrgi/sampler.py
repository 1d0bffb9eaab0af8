"""The sampler: prompts -> [denoise -> guide -> commit] x T -> texts and rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entrgi.commit import commit, end_finished_
from entrgi.config import SamplerConfig, SamplerOptions, resolve
from entrgi.denoisers import Denoiser
from entrgi.guidance import GuidanceTrace, optimize_logits
from entrgi.matmul import fast_products
from entrgi.messages import Prompt
from entrgi.outputs import HistoryBuilder, Output, StepRecord, StepState
from entrgi.positions import MaskedPositions, masked_positions
from entrgi.prompts import Completion
from entrgi.rewards import Reward
from entrgi.rows import with_aligned_rows
from entrgi.schedule import Batch, Step
from entrgi.sequences import Sequences
from entrgi.streaming import Stream, Streamer
from entrgi.task import Task, check_models, prepare
from entrgi.timing import span

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.inference_mode(False)  # guidance differentiates, whatever mode the caller is in
@torch.no_grad()
def generate(
    prompts: Prompt | Sequence[Prompt],
    denoiser: Denoiser,
    reward: Reward | None = None,
    config: SamplerConfig | str | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    trajectory_seeds: Tensor | None = None,
    forbidden_ids: Sequence[int] = (),
    suppress_tokens: Sequence[int] | None = None,
    mask_id: int | None = None,
    reward_prompts: Prompt | Sequence[Prompt] | None = None,
    callback_on_step_end: Callable[[StepState], object] | None = None,
    streamer: Streamer | None = None,
    output_history: bool = False,
    return_dict_in_generate: bool = True,
    **options: Unpack[SamplerOptions],
) -> Output | Tensor:
    """Sample K responses to each of B prompts, steered by the reward's gradient (arXiv 2602.05000).

    Args:
        prompts: one text, one chat (a list of messages), or a list of either. Where a chat's last message is the
            assistant's, the response continues it.
        denoiser: see :mod:`entrgi.denoisers`.
        reward: see :mod:`entrgi.rewards`; its model must be on the denoiser's device. None only with
            ``guidance="none"``: nobody judges the texts then, and rewards are NaN.
        config: a :class:`SamplerConfig` or a preset's name; None is the ``paper`` preset.
        seed: an integer from which all trajectory seeds derive; None draws one.
        generator: draws that integer instead.
        trajectory_seeds: int64 [B, N] (N trajectories per prompt), used as they are. A trajectory's draws depend
            on its seed and nothing else, so a batch equals its single runs.
        forbidden_ids: never drawn, besides the mask token and ids without a token.
        suppress_tokens: further ``forbidden_ids``, by the name that other samplers give them.
        mask_id: None, or the denoiser's mask token: whoever passes another is told.
        reward_prompts: what the reward reads in place of ``prompts``, one for each.
        callback_on_step_end: called with a :class:`StepState`; an exception from it ends the generation.
        streamer: gets the ids of the only trajectory as soon as nothing before them is masked, up to the first
            token that ends it; such as transformers' ``TextStreamer``. Its ``end`` is called once, whatever
            happens.
        output_history: keep every step's :class:`StepState` in ``Output.steps``.
        return_dict_in_generate: False returns the ids alone, int64 [B * K, S].
        options: fields of :class:`SamplerConfig` that replace those of ``config``, or their aliases
            ``gen_length``, ``num_inference_steps``, ``remasking`` and ``eos_early_stop`` (see
            :func:`entrgi.config.resolve`).

    Returns:
        :class:`Output`.

    Raises:
        ValueError: before generation starts, naming the argument: a prompt that holds the mask token or does
            not fit a context, models that do not fit each other, more than one source of seeds.
        RuntimeError: naming the step, where logits are invalid (NaN, +inf), nothing can be drawn or the reward is
            not finite.
        BaseException: whatever ends a generation that has started (Ctrl-C, an error of a model, of the callback or of
            the streamer) is passed on, with what was done so far as its attribute ``partial``, an :class:`Output`
            that is not ``complete``.

    Example:
        >>> import torch, entrgi, entrgi.demo
        >>> denoiser = entrgi.MaskedLM(*entrgi.demo.load_denoiser(torch.float32))
        >>> reward = entrgi.SequenceClassifierReward(*entrgi.demo.load_reward(torch.float32))
        >>> entrgi.generate("The movie was", denoiser, reward, max_new_tokens=16, steps=16, seed=0).texts
    """
    started = time.perf_counter()
    with Stream(streamer) as stream:
        check_models(denoiser, reward)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        with fast_products(torch.device(denoiser.device)):
            task = prepare(
                prompts,
                denoiser,
                reward,
                resolve(config, options),
                seed=seed,
                generator=generator,
                trajectory_seeds=trajectory_seeds,
                forbidden_ids=(*forbidden_ids, *(suppress_tokens or ())),
                mask_id=mask_id,
                reward_prompts=reward_prompts,
            )
            output = _run(task, stream, callback_on_step_end, output_history, started)
    return output if return_dict_in_generate else output.sequences.flatten(0, 1)


def _run(
    task: Task, stream: Stream, callback: Callable[[StepState], object] | None, keep_states: bool, started: float
) -> Output:
    """All steps; what ends them early carries what is done."""
    history = HistoryBuilder(keep_states)
    timings = dict.fromkeys(("denoise", "guide", "commit", "score"), 0.0)
    try:
        stream.start(task)
        for step in task.steps:
            with span("step"):
                state = advance(task, step, timings)
            history.add(state)
            stream.update()
            if callback is not None:
                callback(state)
        task.raise_on_error()
        stream.end()
        return _finish(task, history, timings, started, complete=True)
    except BaseException as error:
        with suppress(Exception):  # a device that fails must not hide why the generation ends
            error.partial = _finish(task, history, timings, started, complete=False)
        raise


def advance(task: Task, step: Step, timings: dict[str, float]) -> StepState:
    """One denoising step of the trajectories that commit in it; ``timings`` grow by its seconds."""
    started = time.perf_counter()
    record = StepRecord(task.sequences.tokens)
    for batch in step.batches:
        try:
            advance_batch(task, step, batch, record, timings)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(task.describe(step.index, error)) from error
    sequences, config = task.sequences, task.config
    if config.early_exit and task.ends:
        end_finished_(sequences.tokens, sequences.window, task.denoiser.mask_token_id, task.ends)
    return record.state(step.index, config.steps, sequences.tokens, time.perf_counter() - started)


def advance_batch(task: Task, step: Step, batch: Batch, record: StepRecord, timings: dict[str, float]) -> None:
    """:func:`advance` for the trajectories of ``batch``: denoise, guide, commit."""
    clock = [time.perf_counter()]
    sequences = task.sequences.select(batch.active)
    size = task.config.padded(batch.rows)
    rows = masked_positions(sequences, step, batch, task.denoiser.mask_token_id, size)
    logits = denoise(task, sequences, rows)
    clock.append(time.perf_counter())
    trace = guide(task, step, batch, sequences, rows, logits) if step.guided else None
    clock.append(time.perf_counter())
    entropy, committed = commit(task, step, batch, sequences, rows, logits, trace)
    if sequences is not task.sequences:
        task.sequences.tokens[batch.active] = sequences.tokens
    record.add(batch, rows, entropy, committed, trace)
    clock.append(time.perf_counter())
    for i, name in enumerate(("denoise", "guide", "commit")):
        timings[name] += clock[i + 1] - clock[i]


def denoise(task: Task, sequences: Sequences, rows: MaskedPositions) -> Tensor:
    """The denoiser's logits z [N, V] at ``rows``, in ``logits_dtype`` and aligned rows."""
    positions = rows.trajectories * sequences.tokens.shape[1] + rows.columns
    with span("denoiser"):
        logits = task.denoiser.logits(sequences.tokens, sequences.attention_mask, positions)
    return with_aligned_rows(logits, task.config.logits_dtype or logits.dtype)


def guide(
    task: Task, step: Step, batch: Batch, sequences: Sequences, rows: MaskedPositions, logits: Tensor
) -> GuidanceTrace:
    """Optimise ``logits`` [N, V] in place for the reward."""
    # A graph keeps `optimize` and so must not be kept by it: no `task` inside.
    config, forbidden, reward = task.config, task.forbidden, task.target.select(batch.active)
    inputs_embeds, ids = reward.inputs(sequences.tokens)
    destinations = torch.where(rows.real, reward.rows(rows.trajectories, rows.columns), -1)
    error_flag = task.error_flags[step.index : step.index + 1]

    def optimize(
        logits: Tensor, inputs_embeds: Tensor, destinations: Tensor, ids: Tensor, keys: Tensor, error_flag: Tensor
    ) -> GuidanceTrace:
        return optimize_logits(
            logits,
            reward.embedding,
            inputs_embeds,
            destinations,
            ids,
            reward,
            keys=keys,
            guidance=config.guidance,
            steps=config.guidance_steps,
            lr=config.guidance_lr,
            optimizer=config.optimizer,
            temperature=config.tau,
            top_p=0.0 if config.is_greedy else config.top_p,  # nothing but the first: the most probable
            top_k=config.top_k,
            forbidden=forbidden,
            gumbel_temperature=config.gumbel_temperature,
            reward_scale=config.reward_scale,
            error_flag=error_flag,
        )

    tensors = (logits, inputs_embeds, destinations, ids, rows.keys, error_flag)
    if task.graphs is None:
        return optimize(*tensors)
    return task.graphs(optimize, tensors, batch.trajectories)


def _finish(task: Task, history: HistoryBuilder, timings: dict[str, float], started: float, complete: bool) -> Output:
    """Decode, score what is complete, and choose what is returned."""
    completions = task.decode()
    candidates, parts = torch.full(task.seeds.shape, torch.nan, dtype=torch.float32), None
    if complete:
        scoring = time.perf_counter()
        judged = completions if task.judged is None else task.decode(task.judged)
        candidates, parts = _score(task.reward, [c for row in judged for c in row])
        candidates = candidates.view(task.seeds.shape)
        timings["score"] = time.perf_counter() - scoring
    kept = task.choose(candidates)
    chosen = [[row[k] for k in ks] for row, ks in zip(completions, kept.tolist(), strict=True)]
    trajectories = (kept + torch.arange(kept.shape[0])[:, None] * task.seeds.shape[1]).flatten()
    return Output(
        sequences=task.sequences.tokens.cpu()[trajectories].view(*kept.shape, -1),
        texts=[[c.text if task.reward.reads_prompt else c.response for c in row] for row in chosen],
        responses=[[c.response for c in row] for row in chosen],
        rewards=candidates.gather(1, kept),
        candidate_rewards=candidates,
        reward_parts=None if parts is None else parts[trajectories].view(*kept.shape, -1),
        seeds=task.seeds.gather(1, kept),
        windows=[(layout.start, layout.stop) for layout in task.layouts],
        history=history.history(),
        steps=None if history.states is None else [state.select(trajectories) for state in history.states],
        timings={**timings, "total": time.perf_counter() - started},
        complete=complete,
    )


def _score(reward: Reward, completions: list[Completion]) -> tuple[Tensor, Tensor | None]:
    """Rewards [n] of finished texts, and of a weighted sum its parts [n, number of rewards]."""
    if not hasattr(reward, "score_parts"):
        return reward.score(completions), None
    parts = reward.score_parts(completions)
    return reward.weigh(parts), parts
