"""The sampler: prompts -> [denoise -> guide -> commit] x T -> texts and rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entrgi.config import SamplerConfig
from entrgi.denoisers import Denoiser
from entrgi.guidance import GuidanceTrace, optimize_logits
from entrgi.outputs import History, Output, StepState
from entrgi.prompts import Prompt
from entrgi.rewards import Reward, attention_mask
from entrgi.schedule import Step, confidence
from entrgi.sequences import Sequences
from entrgi.task import Task, prepare
from entrgi_ext import ops

# The third word of a random key: Adam iterations count from 0, these two draws come after them.
COMMIT_DRAW, POSITION_DRAW = -1, -2


@torch.inference_mode(False)  # guidance differentiates, whatever mode the caller is in
@torch.no_grad()
def generate(
    prompts: Prompt | Sequence[Prompt],
    denoiser: Denoiser,
    reward: Reward,
    config: SamplerConfig | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    trajectory_seeds: Tensor | None = None,
    forbidden_ids: Sequence[int] = (),
    callback_on_step_end: Callable[[StepState], object] | None = None,
) -> Output:
    """Sample K responses to each of B prompts, steered by the reward's gradient (arXiv 2602.05000).

    Args:
        prompts: one text, one chat (a list of messages), or a list of either.
        denoiser: see :mod:`entrgi.denoisers`.
        reward: see :mod:`entrgi.rewards`; its model must be on the denoiser's device.
        config: None is the ``paper`` preset.
        seed: an integer from which all trajectory seeds derive; None draws one.
        generator: draws that integer instead.
        trajectory_seeds: int64 [B, K], used as they are. A trajectory's draws depend on its seed and nothing
            else, so a batch equals its single runs.
        forbidden_ids: never drawn, besides the mask token and ids without a token.
        callback_on_step_end: called with a :class:`StepState`; an exception from it ends the generation.

    Returns:
        :class:`Output`.

    Raises:
        ValueError: before generation starts, naming the argument: a prompt that holds the mask token or does
            not fit a context, models that do not fit each other, more than one source of seeds.
        RuntimeError: naming the step, where logits are invalid (NaN, +inf) or nothing can be drawn.
        KeyboardInterrupt: passed on, with what was done so far as its attribute ``partial``, an
            :class:`Output`.

    Example:
        >>> import torch, entrgi, entrgi.demo
        >>> denoiser = entrgi.MaskedLM(*entrgi.demo.load_denoiser(torch.float32))
        >>> reward = entrgi.SequenceClassifierReward(*entrgi.demo.load_reward(torch.float32))
        >>> config = entrgi.preset("paper", max_new_tokens=16, steps=16)
        >>> entrgi.generate("The movie was", denoiser, reward, config, seed=0).texts
    """
    started = time.perf_counter()
    task = prepare(
        prompts,
        denoiser,
        reward,
        config or SamplerConfig(),
        seed=seed,
        generator=generator,
        trajectory_seeds=trajectory_seeds,
        forbidden_ids=forbidden_ids,
    )
    states: list[StepState] = []
    timings = dict.fromkeys(("denoise", "guide", "commit", "score"), 0.0)
    try:
        for step in task.steps:
            states.append(advance(task, step, timings))
            if callback_on_step_end is not None:
                callback_on_step_end(states[-1])
        task.raise_on_error()
        return _finish(task, states, timings, started, complete=True)
    except KeyboardInterrupt as interrupt:
        interrupt.partial = _finish(task, states, timings, started, complete=False)
        raise


def advance(task: Task, step: Step, timings: dict[str, float]) -> StepState:
    """One denoising step of the trajectories that commit in it; ``timings`` grow by its seconds."""
    clock = [time.perf_counter()]
    batch = task.sequences.select(step.active)
    positions, keys = masked_positions(batch, step, task.denoiser.mask_token_id)
    logits = denoise(task, batch, positions)
    clock.append(time.perf_counter())
    try:
        trace = guide(task, step, batch, positions, keys, logits)
        clock.append(time.perf_counter())
        commit(task, step, batch, positions, keys, logits, trace)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise RuntimeError(f"denoising step {step.index} of {task.config.steps}: {error}") from error
    if batch is not task.sequences:
        task.sequences.tokens[step.active] = batch.tokens
    clock.append(time.perf_counter())

    for i, name in enumerate(("denoise", "guide", "commit")):
        timings[name] += clock[i + 1] - clock[i]
    return StepState(
        step=step.index,
        steps=task.config.steps,
        tokens=task.sequences.tokens,
        committed=step.total,
        reward=None if trace is None else trace.rewards[-1].mean(),
        weight=None if trace is None else trace.weights[-1].mean(),
        seconds=clock[-1] - clock[0],
    )


def masked_positions(batch: Sequences, step: Step, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Masked positions, int64 [N] into the flattened [P * S], and their random keys, int64 [N, 4].

    N is known from the schedule, so the device is not asked for it.
    """
    masked = batch.tokens == mask_token_id
    if batch.attention_mask is not None:
        masked &= batch.attention_mask.bool()
    positions = torch.nonzero_static(masked.flatten(), size=step.masked, fill_value=0)[:, 0]
    width = batch.tokens.shape[1]
    seed, column = batch.seeds[positions // width], positions % width
    return positions, torch.stack([seed, torch.full_like(seed, step.index), torch.zeros_like(seed), column], dim=1)


def denoise(task: Task, batch: Sequences, positions: Tensor) -> Tensor:
    """The denoiser's logits z [N, V] at ``positions``, in ``logits_dtype``."""
    logits = task.denoiser.logits(batch.tokens, batch.attention_mask, positions)
    return logits.to(task.config.logits_dtype or logits.dtype)


def guide(
    task: Task, step: Step, batch: Sequences, positions: Tensor, keys: Tensor, logits: Tensor
) -> GuidanceTrace | None:
    """Optimise ``logits`` [N, V] in place for the reward; nothing and None where ``guidance`` is ``none``."""
    config, denoiser = task.config, task.denoiser
    if config.guidance == "none":
        return None
    sequences = task.reward_sequences.select(step.active)

    def reward(inputs_embeds: Tensor, tokens: Tensor) -> Tensor:
        visible = attention_mask(
            tokens, sequences.valid, sequences.response, denoiser.eos_token_id, denoiser.pad_token_id
        )
        return task.reward.relaxed(inputs_embeds, visible)

    width = batch.tokens.shape[1]
    inputs_embeds, tokens = sequences.inputs(batch.tokens, task.embedding)
    return optimize_logits(
        logits,
        task.embedding,
        inputs_embeds,
        sequences.rows(positions // width, positions % width),
        tokens,
        reward,
        keys=keys,
        guidance=config.guidance,
        steps=config.guidance_steps,
        lr=config.guidance_lr,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        forbidden=task.forbidden,
        reward_scale=config.reward_scale,
        error_flag=task.error_flags[step.index : step.index + 1],
    )


def commit(
    task: Task,
    step: Step,
    batch: Sequences,
    positions: Tensor,
    keys: Tensor,
    logits: Tensor,
    trace: GuidanceTrace | None,
) -> Tensor:
    """Draw a token at every masked position and write the most confident into ``batch.tokens``.

    Returns:
        bool [N], the positions that were committed.
    """
    config = task.config
    draw, rank = keys.clone(), keys.clone()
    draw[:, 2], rank[:, 2] = COMMIT_DRAW, POSITION_DRAW
    error_flag = task.error_flags[step.index : step.index + 1]
    sample = ops.sample_tokens(logits, draw, config.temperature, config.top_p, config.top_k, task.forbidden, error_flag)
    initial_entropy = sample.tempered_entropy if trace is None else trace.initial_entropy
    committed = torch.zeros_like(positions, dtype=torch.bool)
    ops.commit_(
        batch.tokens,
        committed,
        sample.token,
        confidence(config.alg, sample, logits, initial_entropy, config.entropy_source),
        positions % batch.tokens.shape[1],
        step.splits,
        step.counts,
        keys=rank if config.alg_temp > 0 else None,
        eos_token_id=task.denoiser.eos_token_id if config.deprioritize_eos else None,
        alg_temp=config.alg_temp,
    )
    return committed


def _finish(task: Task, states: list[StepState], timings: dict[str, float], started: float, complete: bool) -> Output:
    """Decode, and score what is complete."""
    texts, responses = task.decode()
    rewards = torch.full(task.seeds.shape, torch.nan)
    if complete:
        scoring = time.perf_counter()
        pairs = [(text, prompt) for row, prompt in zip(texts, task.prompts, strict=True) for text in row]
        rewards = task.reward.score(*zip(*pairs, strict=True)).view(task.seeds.shape)
        timings["score"] = time.perf_counter() - scoring
    return Output(
        sequences=task.sequences.tokens.view(*task.seeds.shape, -1).cpu(),
        texts=texts,
        responses=responses,
        rewards=rewards,
        seeds=task.seeds,
        history=History.of(states),
        timings={**timings, "total": time.perf_counter() - started},
        complete=complete,
    )
