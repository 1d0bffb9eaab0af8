"""From optimised logits to tokens: a draw at every masked position, the most confident of which are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entrgi.generation import Generation
from entrgi.guidance import GuidanceOutput
from entrgi.positions import MaskedPositions
from entrgi.schedule import COMMIT_DRAW, POSITION_DRAW, Batch, Step
from entrgi.sequences import Sequences, holds_any
from entrgi.timing import span
from entrgi_ext import ops


def commit(
    generation: Generation,
    step: Step,
    batch: Batch,
    sequences: Sequences,
    rows: MaskedPositions,
    logits: Tensor,
    guided: GuidanceOutput | None,
) -> tuple[Tensor, Tensor]:
    """Draw a token at every masked position and write the most confident into ``sequences.tokens``.

    Returns:
        entropy of the denoiser's own logits, [N], and bool [N], the rows that were committed.
    """
    config, ends = generation.config, generation.ranked_ends
    with span("sample_tokens"):
        sample = draw(generation, step, rows, logits)
    entropy = sample.tempered_entropy if guided is None else guided.initial_entropy
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


def draw(generation: Generation, step: Step, rows: MaskedPositions, logits: Tensor) -> ops.Sample:
    """What a position would commit, drawn from the optimised logits z [N, V], with its confidences."""
    config, keys = generation.config, rows.keys_of(COMMIT_DRAW)
    error_flag = generation.error_flags[step.index : step.index + 1]
    shared = (generation.forbidden, error_flag)
    sample = ops.sample_tokens(logits, keys, config.tau, config.top_p, config.top_k, *shared)
    if not config.is_greedy:
        return sample
    # The first of a row's largest logits, whose probability under the filter follows from the drawn one's.
    best = ops.sample_tokens(logits, keys, config.tau, 0.0, None, *shared).token
    drawn, largest = (logits.gather(1, ids.clamp(min=0)[:, None])[:, 0] for ids in (sample.token, best))
    ratio = (largest.to(sample.probability.dtype) - drawn.to(sample.probability.dtype)).exp()
    return sample._replace(token=best, probability=sample.probability * ratio)


def competing(batch: Batch, rows: MaskedPositions) -> Tensor:
    """bool [N]: the rows that may be committed, the leading ones of each trajectory."""
    place = torch.arange(rows.real.shape[0], device=rows.real.device) - batch.splits[rows.trajectories]
    return rows.real & (place < batch.competing[rows.trajectories])


def count_confident(
    score: Tensor, candidates: Tensor, batch: Batch, rows: MaskedPositions, threshold: float, ends: Sequence[int]
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


def confidence(alg: str, sample: ops.Sample, logits: Tensor, initial_entropy: Tensor, entropy_source: str) -> Tensor:
    """Confidence [N] of committing ``sample.token`` at each of N positions; higher commits earlier.

    Args:
        alg: see :class:`entrgi.config.SamplerConfig`; ``random`` has the same everywhere, ``origin`` none.
        sample: the commit draw from the optimised logits.
        logits: [N, V], the optimised logits.
        initial_entropy: [N], entropy in nats of the denoiser's own logits at tau, unfiltered.
        entropy_source: ``initial`` or ``filtered``, for ``alg="entropy"``.

    Raises:
        ValueError: for an unknown ``alg`` or ``entropy_source``.
    """
    if alg == "entropy" and entropy_source == "initial":
        return -initial_entropy
    if alg == "entropy" and entropy_source == "filtered":
        return -sample.filtered_entropy
    if alg == "random":
        return torch.zeros_like(initial_entropy)
    if alg == "maskgit_plus":
        return sample.probability
    if alg == "topk_margin":
        return sample.margin
    if alg == "anchor":
        drawn = logits.gather(1, sample.token.clamp(min=0)[:, None])[:, 0]
        return drawn.to(sample.probability.dtype)
    raise ValueError(f"alg {alg!r} with entropy_source {entropy_source!r} is not a confidence rule")
