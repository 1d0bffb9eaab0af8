"""The sampler: prompts -> [denoise -> guide -> commit] x T -> texts and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from entrgi.commit import commit, end_finished_
from entrgi.config import SamplerConfig, SamplerOptions, resolve
from entrgi.denoisers import Denoiser
from entrgi.generation import Generation, check_models, prepare
from entrgi.guidance import GuidanceOutput, ascend
from entrgi.matmul import onednn_matmul
from entrgi.messages import Prompt
from entrgi.outputs import HistoryBuilder, Output, StepRecord, StepState
from entrgi.positions import MaskedPositions, masked_positions
from entrgi.prompts import Completion
from entrgi.rewards import Reward, WeightedReward
from entrgi.rewards.protocol import row_index
from entrgi.rows import with_aligned_rows
from entrgi.schedule import Batch, Step
from entrgi.sequences import Sequences
from entrgi.streaming import Stream, Streamer
from entrgi.timing import STEP, PhaseRecorder, phase, span


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
    with Stream(streamer) as stream:
        check_models(denoiser, reward)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        device = torch.device(denoiser.device)
        # Guidance differentiates, whatever mode the caller is in.
        with PhaseRecorder(device) as clock, torch.inference_mode(False), torch.no_grad(), onednn_matmul(device):
            generation = prepare(
                prompts,
                denoiser,
                reward,
                resolve(config, options),
                seed=seed,
                generator=generator,
                trajectory_seeds=trajectory_seeds,
                forbidden_ids=forbidden_ids,
                suppress_tokens=suppress_tokens,
                mask_id=mask_id,
                reward_prompts=reward_prompts,
            )
            output = _run(generation, stream, callback_on_step_end, output_history, clock)
    return output if return_dict_in_generate else output.sequences.flatten(0, 1)


def _run(
    generation: Generation,
    stream: Stream,
    callback: Callable[[StepState], object] | None,
    keep_states: bool,
    clock: PhaseRecorder,
) -> Output:
    """All steps; what ends them early carries what is done."""
    history = HistoryBuilder(keep_states)
    try:
        stream.start(generation)
        for step in generation.steps:
            with span(STEP), phase(STEP) as mark:
                record = advance(generation, step)
            assert mark is not None
            state = record.state(step.index, generation.config.steps, generation.sequences.tokens, mark.host_seconds)
            history.add(state)
            stream.update()
            if callback is not None:
                callback(state)
        generation.raise_on_error()
        stream.end()
        return _finish(generation, history, clock, complete=True)
    except BaseException as error:
        with suppress(Exception):  # a device that fails must not hide why the generation ends
            done = _finish(generation, history, clock, complete=False)
            error.partial = done  # pyright: ignore[reportAttributeAccessIssue]: exceptions take attributes
        raise


def advance(generation: Generation, step: Step) -> StepRecord:
    """One denoising step of the trajectories that commit in it: denoise, guide, commit."""
    config, record = generation.config, StepRecord(generation.sequences.tokens)
    for batch in step.batches:
        sequences = generation.sequences.select(batch.active)
        try:
            size = config.padded(batch.rows)
            rows = masked_positions(sequences, step, batch, generation.denoiser.mask_token_id, size)
            with phase("denoise"):
                logits = denoise(generation, sequences, rows)
            with phase("guide"):
                guided = guide(generation, step, batch, sequences, rows, logits) if step.guided else None
            with phase("commit"):
                entropy, committed = commit(generation, step, batch, sequences, rows, logits, guided)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(generation.describe(step.index, error)) from error
        if sequences is not generation.sequences:
            generation.sequences.tokens[batch.active] = sequences.tokens
        record.add(batch, rows, entropy, committed, guided)
    if config.early_exit and generation.ends:
        sequences = generation.sequences
        end_finished_(sequences.tokens, sequences.window, generation.denoiser.mask_token_id, generation.ends)
    return record


def denoise(generation: Generation, sequences: Sequences, rows: MaskedPositions) -> Tensor:
    """The denoiser's logits z [N, V] at ``rows``, in ``logits_dtype`` and aligned rows."""
    positions = rows.trajectories * sequences.tokens.shape[1] + rows.columns
    with span("denoiser"):
        logits = generation.denoiser.logits(sequences.tokens, sequences.attention_mask, positions)
    dtype = cast("torch.dtype | None", generation.config.logits_dtype)  # no name any more
    return with_aligned_rows(logits, dtype or logits.dtype)


def guide(
    generation: Generation, step: Step, batch: Batch, sequences: Sequences, rows: MaskedPositions, logits: Tensor
) -> GuidanceOutput:
    """Optimise ``logits`` [N, V] in place for the reward."""
    assert generation.target is not None  # guidance needs a reward
    config, reward = generation.config, generation.target.select(batch.active)
    inputs_embeds, tokens = reward.inputs(sequences.tokens)
    tensors = {
        "logits": logits,
        "inputs_embeds": inputs_embeds,
        "row_index": torch.where(rows.real, row_index(reward, rows.trajectories, rows.columns), -1),
        "tokens": tokens,
        "keys": rows.keys,
        "error_flag": generation.error_flags[step.index : step.index + 1],
    }
    # A graph keeps `optimize` and so must not be kept by it: no `generation` inside.
    optimize = partial(
        ascend,
        embedding=reward.embedding,
        reward=reward,
        guidance=config.guidance,
        steps=config.guidance_steps,
        lr=config.guidance_lr,
        optimizer=config.optimizer,
        temperature=config.tau,
        top_p=0.0 if config.is_greedy else config.top_p,  # nothing but the first: the most probable
        top_k=config.top_k,
        forbidden=generation.forbidden,
        gumbel_temperature=config.gumbel_temperature,
        reward_scale=config.reward_scale,
    )
    if generation.graphs is None:
        return optimize(**tensors)
    return generation.graphs(optimize, tensors, batch.trajectories)


def _finish(generation: Generation, history: HistoryBuilder, clock: PhaseRecorder, complete: bool) -> Output:
    """Decode, score what is complete, and choose what is returned."""
    completions = generation.decode()
    candidates, parts = torch.full(generation.seeds.shape, torch.nan, dtype=torch.float32), None
    if complete:
        with phase("score"):
            judged = completions if generation.judged is None else generation.decode(generation.judged)
            candidates, parts = _score(generation.reward, [c for row in judged for c in row])
        candidates = candidates.view(generation.seeds.shape)
    kept = generation.choose(candidates)
    chosen = [[row[k] for k in ks] for row, ks in zip(completions, kept.tolist(), strict=True)]
    trajectories = (kept + torch.arange(kept.shape[0])[:, None] * generation.seeds.shape[1]).flatten()
    return Output(
        sequences=generation.sequences.tokens.cpu()[trajectories].view(*kept.shape, -1),
        texts=[[c.text if generation.reward.reads_prompt else c.response for c in row] for row in chosen],
        responses=[[c.response for c in row] for row in chosen],
        rewards=candidates.gather(1, kept),
        candidate_rewards=candidates,
        reward_parts=None if parts is None else parts[trajectories].view(*kept.shape, -1),
        seeds=generation.seeds.gather(1, kept),
        windows=[(layout.start, layout.stop) for layout in generation.layouts],
        history=history.history(),
        steps=None if history.states is None else [state.select(trajectories) for state in history.states],
        timings=clock.timings(),
        complete=complete,
    )


def _score(reward: Reward, completions: list[Completion]) -> tuple[Tensor, Tensor | None]:
    """Rewards [n] of finished texts, and of a weighted sum its parts [n, number of rewards]."""
    if not hasattr(reward, "score_parts"):
        return reward.score(completions), None
    weighted: WeightedReward = cast(Any, reward)
    parts = weighted.score_parts(completions)
    return weighted.weigh(parts), parts
