"""The sampler: prompts -> [denoise -> guide -> commit] x T -> texts and rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from entrgi.config import SamplerConfig, resolve
from entrgi.denoisers import Denoiser
from entrgi.guidance import GuidanceTrace, optimize_logits
from entrgi.matmul import fast_products
from entrgi.messages import Prompt
from entrgi.outputs import HistoryBuilder, Output, StepState
from entrgi.prompts import Completion
from entrgi.rewards import Reward
from entrgi.rows import with_aligned_rows
from entrgi.schedule import COMMIT_DRAW, POSITION_DRAW, Batch, Step, confidence
from entrgi.sequences import Sequences, holds_any
from entrgi.streaming import Stream, Streamer
from entrgi.task import Task, check_models, prepare
from entrgi.timing import span
from entrgi_ext import ops


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
    mask_id: int | None = None,
    reward_prompts: Prompt | Sequence[Prompt] | None = None,
    callback_on_step_end: Callable[[StepState], object] | None = None,
    streamer: Streamer | None = None,
    output_history: bool = False,
    return_dict_in_generate: bool = True,
    **options: object,
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
        mask_id: None, or the denoiser's mask token: whoever passes another is told.
        reward_prompts: what the reward reads in place of ``prompts``, one for each.
        callback_on_step_end: called with a :class:`StepState`; an exception from it ends the generation.
        streamer: gets the ids of the only trajectory as soon as nothing before them is masked, up to the first
            token that ends it; such as transformers' ``TextStreamer``. Its ``end`` is called once, whatever
            happens.
        output_history: keep every step's :class:`StepState` in ``Output.steps``.
        return_dict_in_generate: False returns the ids alone, int64 [B * K, S].
        options: fields of :class:`SamplerConfig` that replace those of ``config``, or their aliases
            ``gen_length``, ``num_inference_steps`` and ``remasking`` (see :func:`entrgi.config.resolve`).

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
                forbidden_ids=forbidden_ids,
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
    record = _StepRecord(task.sequences.tokens)
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


def advance_batch(task: Task, step: Step, batch: Batch, record: _StepRecord, timings: dict[str, float]) -> None:
    """:func:`advance` for the trajectories of ``batch``: denoise, guide, commit."""
    clock = [time.perf_counter()]
    sequences = task.sequences.select(batch.active)
    size = task.config.padded(batch.rows)
    rows = masked_rows(sequences, step, batch, task.denoiser.mask_token_id, size)
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


@dataclass(frozen=True)
class Rows:
    """The N masked positions that a batch works on, padded to a multiple of the row bucket.

    Padding repeats the first row: a denoiser may give anything, NaN included, where nothing is masked.

    Attributes:
        trajectories, columns: int64 [N], of the batch's tokens [A, S].
        keys: int64 [N, 4], (seed, denoising step, 0, column).
        real: bool [N], false in padding rows.
    """

    trajectories: Tensor
    columns: Tensor
    keys: Tensor
    real: Tensor

    def keys_of(self, draw: int) -> Tensor:
        """``keys`` of another draw, int64 [N, 4]."""
        keys = self.keys.clone()
        keys[:, 2].fill_(draw)
        return keys


def masked_rows(sequences: Sequences, step: Step, batch: Batch, mask_token_id: int, size: int) -> Rows:
    """Masked positions of a batch, row-major by trajectory, padded to ``size`` rows.

    Their number is known from the schedule, so the device is not asked for it.
    """
    masked = sequences.tokens == mask_token_id
    if sequences.attention_mask is not None:
        masked &= sequences.attention_mask.bool()
    if not step.guided:  # nobody reads the logits of what does not compete
        masked &= masked.cumsum(dim=1) <= batch.competing[:, None]
    real = torch.arange(size, device=masked.device) < batch.rows
    positions = torch.nonzero_static(masked, size=size, fill_value=0)
    trajectories, columns = torch.where(real[:, None], positions, positions[:1]).unbind(dim=1)
    zero = torch.zeros_like(columns)
    keys = torch.stack([sequences.seeds[trajectories], zero + step.index, zero, columns], dim=1)
    return Rows(trajectories, columns, keys, real)


def denoise(task: Task, sequences: Sequences, rows: Rows) -> Tensor:
    """The denoiser's logits z [N, V] at ``rows``, in ``logits_dtype`` and aligned rows."""
    positions = rows.trajectories * sequences.tokens.shape[1] + rows.columns
    with span("denoiser"):
        logits = task.denoiser.logits(sequences.tokens, sequences.attention_mask, positions)
    return with_aligned_rows(logits, task.config.logits_dtype or logits.dtype)


def guide(task: Task, step: Step, batch: Batch, sequences: Sequences, rows: Rows, logits: Tensor) -> GuidanceTrace:
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


def commit(
    task: Task,
    step: Step,
    batch: Batch,
    sequences: Sequences,
    rows: Rows,
    logits: Tensor,
    trace: GuidanceTrace | None,
) -> tuple[Tensor, Tensor]:
    """Draw a token at every masked position and write the most confident into ``sequences.tokens``.

    Returns:
        entropy of the denoiser's own logits, [N], and bool [N], the rows that were committed.
    """
    config, ends = task.config, task.ranked_ends
    with span("sample_tokens"):
        sample = draw(task, step, rows, logits)
    entropy = sample.tempered_entropy if trace is None else trace.initial_entropy
    with span("commit"):
        counts = batch.counts
        if batch.chosen is not None:  # origin: what commits is settled, whatever was drawn there
            score, ends = torch.zeros_like(entropy), ()
            score[: batch.rows] = batch.chosen.to(score.dtype)
        else:
            ends = ends if config.deprioritize_eos else ()
            score = confidence(config.alg, sample, logits, entropy, config.entropy_source)
            score = score.masked_fill(~competing(batch, rows), -torch.inf)
        if config.threshold is not None:
            counts = counts.maximum(count_confident(score, sample.token, batch, rows, config.threshold, ends))
        if len(ends) > 1:  # the operator knows one
            score = score.masked_fill(holds_any(sample.token, ends[1:]), -torch.inf)
        committed = torch.zeros_like(rows.real)
        ops.commit_(
            sequences.tokens,
            committed,
            sample.token,
            score,
            rows.columns,
            batch.splits,
            counts,
            keys=rows.keys_of(POSITION_DRAW) if config.position_temperature > 0 else None,
            eos_token_id=next(iter(ends), None),
            alg_temp=config.position_temperature,
        )
    return entropy, committed


def draw(task: Task, step: Step, rows: Rows, logits: Tensor) -> ops.Sample:
    """What a position would commit, drawn from the optimised logits z [N, V], with its confidences."""
    config, keys = task.config, rows.keys_of(COMMIT_DRAW)
    error_flag = task.error_flags[step.index : step.index + 1]
    shared = (task.forbidden, error_flag)
    sample = ops.sample_tokens(logits, keys, config.tau, config.top_p, config.top_k, *shared)
    if not config.is_greedy:
        return sample
    # The first of a row's largest logits, whose probability under the filter follows from the drawn one's.
    best = ops.sample_tokens(logits, keys, config.tau, 0.0, None, *shared).token
    drawn, largest = (logits.gather(1, ids.clamp(min=0)[:, None])[:, 0] for ids in (sample.token, best))
    ratio = (largest.to(sample.probability.dtype) - drawn.to(sample.probability.dtype)).exp()
    return sample._replace(token=best, probability=sample.probability * ratio)


def competing(batch: Batch, rows: Rows) -> Tensor:
    """bool [N]: the rows that may be committed, the leading ones of each trajectory."""
    place = torch.arange(rows.real.shape[0], device=rows.real.device) - batch.splits[rows.trajectories]
    return rows.real & (place < batch.competing[rows.trajectories])


def count_confident(
    score: Tensor, candidates: Tensor, batch: Batch, rows: Rows, threshold: float, ends: Sequence[int]
) -> Tensor:
    """int64 [A]: how many rows of each trajectory have a confidence of at least ``threshold``.

    ``score`` [N] is -inf in rows that do not compete, so they never count.
    """
    confident = score >= threshold
    if ends:  # de-prioritised: their confidence is -inf
        confident &= ~holds_any(candidates, ends)
    return torch.zeros_like(batch.counts).index_add_(0, rows.trajectories, confident.long())


def end_finished_(tokens: Tensor, window: Tensor, mask_token_id: int, ends: Sequence[int]) -> None:
    """Fill what is masked behind the first end of a response with ``ends[0]``, where nothing before it is masked.

    ``tokens`` int64 [P, S], in place; ``window`` bool [P, S], the response.
    """
    masked = window & (tokens == mask_token_id)
    behind = (window & holds_any(tokens, ends)).cumsum(dim=1) > 0
    finished = behind.any(dim=1) & ~(masked & ~behind).any(dim=1)
    tokens.masked_fill_(masked & finished[:, None], ends[0])


class _StepRecord:
    """Collects what a step's batches did into tensors over all trajectories."""

    def __init__(self, tokens: Tensor) -> None:
        self.shape = tokens.shape
        # One slot more than there are positions takes what padding rows write.
        nan = torch.full((tokens.numel() + 1,), torch.nan, dtype=torch.float32, device=tokens.device)
        self.entropy, self.weight = nan, nan.clone()
        self.committed = torch.zeros_like(nan, dtype=torch.bool)
        self.reward = nan[: self.shape[0]].clone()

    def add(self, batch: Batch, rows: Rows, entropy: Tensor, committed: Tensor, trace: GuidanceTrace | None) -> None:
        places = batch.active[rows.trajectories] * self.shape[1] + rows.columns
        places = torch.where(rows.real, places, self.entropy.shape[0] - 1)
        self.entropy[places] = entropy.float()
        self.committed[places] = committed
        if trace is not None:
            self.weight[places] = trace.weights[-1].float()
            self.reward[batch.active] = trace.rewards[-1].float()

    def state(self, index: int, steps: int, tokens: Tensor, seconds: float) -> StepState:
        entropy, weight, committed = (x[:-1].view(self.shape) for x in (self.entropy, self.weight, self.committed))
        return StepState(index, steps, tokens.clone(), committed, entropy, weight, self.reward, seconds)


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
