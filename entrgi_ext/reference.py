"""Every operator in plain PyTorch, written for clarity.

These functions take the arguments of :mod:`entrgi_ext.ops` and are what the compiled operators are
tested against. Called on fp64 tensors they are the truth; called at the operator's own dtypes they are
"the same computation in PyTorch", whose error bounds that of the compiled operator.

Dtypes: statistics are computed in ``accumulator_dtype(logits)``, matrix products in the embedding's dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import gumbel

# Probability masses are compared as integers: e^((z - max) / temperature) in units of 2^-40, so that their
# sums are exact and depend on no order of summation. V must stay below 2^23, where a sum could overflow int64.
MASS_BITS = 40


class Statistics(NamedTuple):
    """What one read of the logits gives; all tensors are [N]."""

    logsumexp: Tensor
    entropy: Tensor
    tempered_entropy: Tensor
    argmax: Tensor


class Sample(NamedTuple):
    """:class:`Statistics` and a token drawn in the same read; all tensors are [N]."""

    logsumexp: Tensor
    entropy: Tensor
    tempered_entropy: Tensor
    argmax: Tensor
    token: Tensor
    probability: Tensor
    margin: Tensor
    filtered_entropy: Tensor


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _invalid_rows(logits: Tensor) -> Tensor:
    bad = torch.isnan(logits) | (logits == math.inf)
    return bad.any(dim=1) | ~torch.isfinite(logits).any(dim=1)


def _entropy(z: Tensor, temperature: float = 1.0) -> Tensor:
    # The maximum goes first: z / temperature may overflow where (z - max) / temperature does not.
    log_p = ((z - z.amax(dim=1, keepdim=True)) / temperature).log_softmax(dim=1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=1)


def logit_statistics(logits: Tensor, temperature: float) -> Statistics:
    """logsumexp(z / tau), H(softmax z), H(softmax z / tau) in nats, and the first index of the maximum."""
    z = logits.to(accumulator_dtype(logits))
    bad = _invalid_rows(z)
    return Statistics(
        logsumexp=(z / temperature).logsumexp(dim=1).masked_fill(bad, math.nan),
        entropy=_entropy(z).masked_fill(bad, math.nan),
        tempered_entropy=_entropy(z, temperature).masked_fill(bad, math.nan),
        argmax=z.argmax(dim=1).masked_fill(bad, -1),
    )


def gumbel_perturb(logits: Tensor, keys: Tensor, scale: float) -> Tensor:
    """z + scale * g in the accumulator dtype, g the noise of the row's key and each id. NaN and infinities stay."""
    z = logits.to(accumulator_dtype(logits))
    return z + scale * gumbel(keys, torch.arange(z.shape[1], device=z.device)).to(z.dtype)


def kept_by_filter(z: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """The filter of the method: bool [N, V], true where an id survives top-p, then top-k.

    Ids are ordered by (z descending, id ascending). Kept by top-p: mass strictly ahead <= top_p of the total;
    by top-k: z at least the k-th largest, ties included. ``z`` has -inf at forbidden ids.
    """
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    ranked = z.gather(1, order)
    mass = ((ranked - ranked[:, :1]) / temperature).exp()
    mass = (mass.double() * 2.0**MASS_BITS).round().long()
    ahead = mass.cumsum(dim=1) - mass
    keep = ahead.double() <= top_p * mass.sum(dim=1, keepdim=True).double()
    keep[:, 0] = True
    if top_k is not None:
        keep &= ranked >= ranked[:, min(top_k, z.shape[1]) - 1, None]
    keep &= ranked > -math.inf
    return torch.zeros_like(keep).scatter(1, order, keep)


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int | None = None,
    forbidden: Tensor | None = None,
) -> Sample:
    """:func:`logit_statistics` and x ~ softmax(filter(z / tau)), drawn as a keyed Gumbel maximum."""
    statistics = logit_statistics(logits, temperature)
    z = logits.to(accumulator_dtype(logits)) + 0.0  # -0 and +0 are one value in the order of ids
    bad = statistics.argmax < 0
    z = torch.where(bad[:, None], torch.zeros_like(z), z)
    if forbidden is not None and forbidden.dtype == torch.int32:
        z = z.index_fill(1, forbidden.long(), -math.inf)
    elif forbidden is not None:
        z = z.masked_fill(forbidden, -math.inf)
    bad = bad | ~(z > -math.inf).any(dim=1)
    z = torch.where(bad[:, None], torch.zeros_like(z), z)

    kept = z.masked_fill(~kept_by_filter(z, temperature, top_p, top_k), -math.inf)
    scores = (kept - kept.amax(dim=1, keepdim=True)) / temperature
    p = scores.softmax(dim=1)
    ids = torch.arange(z.shape[1], device=z.device)
    token = (scores + gumbel(keys, ids).to(scores.dtype)).argmax(dim=1)
    top2 = p.topk(min(2, p.shape[1]), dim=1).values
    margin = top2[:, 0] - (top2[:, 1] if top2.shape[1] == 2 else 0.0)
    return Sample(
        *statistics,
        token=token.masked_fill(bad, -1),
        probability=p.gather(1, token[:, None])[:, 0].masked_fill(bad, math.nan),
        margin=margin.masked_fill(bad, math.nan),
        filtered_entropy=_entropy(scores).masked_fill(bad, math.nan),
    )


def relaxed_embedding(
    logits: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    hard_tokens: Tensor | None,
    weight: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(1 - w) q E + w E[x] in E's dtype and the unblended q E, with q = exp(z / tau - lse).

    Differentiable through autograd: the hard part is straight-through, so the gradient is that of q E.
    """
    dtype = accumulator_dtype(logits)
    q = (logits.to(dtype) / temperature - logsumexp[:, None].detach()).exp()
    # The value of lse is given, its dependence on z is not: restore softmax's own gradient.
    q = q + (q.detach() * (1 - q.sum(dim=1, keepdim=True) / q.sum(dim=1, keepdim=True).detach()))
    soft = (q.to(embedding.dtype) @ embedding).to(dtype)
    output = soft
    if hard_tokens is not None:
        invalid = (hard_tokens < 0) | (hard_tokens >= embedding.shape[0])
        hard = embedding[hard_tokens.masked_fill(invalid, 0)].to(dtype)
        w = torch.ones_like(logsumexp) if weight is None else weight
        output = soft + (w[:, None] * (hard - soft)).detach()
        output = output.masked_fill(invalid[:, None], math.nan)
    return output.to(embedding.dtype), soft


def logit_gradient(
    grad: Tensor,
    logits: Tensor,
    logsumexp: Tensor,
    embedding: Tensor,
    soft: Tensor,
    row_index: Tensor | None,
    temperature: float,
) -> Tensor:
    """dReward/dz = q (G E^T - G . e_soft) / tau, in the accumulator dtype; 0 in padding rows (``row_index`` -1)."""
    dtype = accumulator_dtype(logits)
    g = grad if row_index is None else grad[row_index.clamp(min=0)]
    q = (logits.to(dtype) / temperature - logsumexp[:, None]).exp()
    inner = (g @ embedding.T).to(dtype) - (g.to(dtype) * soft).sum(dim=1, keepdim=True)
    gradient = torch.where(q != 0, q * inner / temperature, torch.zeros_like(q))
    return gradient if row_index is None else gradient.masked_fill((row_index < 0)[:, None], 0.0)


def adam_step(
    logits: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam *ascent* step (Kingma & Ba, 2015): the new logits and moments; ``step`` counts from 1.

    Knows no padding rows: the operator leaves the logits and moments of those untouched.
    """
    old_m, old_v = 0, 0
    if step != 1:
        assert exp_avg is not None
        assert exp_avg_sq is not None
        old_m, old_v = beta1 * exp_avg, beta2 * exp_avg_sq
    m = (1 - beta1) * gradient + old_m
    v = (1 - beta2) * gradient**2 + old_v
    update = lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return (logits.to(gradient.dtype) + update).to(logits.dtype), m, v


def commit(
    tokens: Tensor,
    candidates: Tensor,
    confidence: Tensor,
    positions: Tensor,
    splits: Tensor,
    counts: Tensor,
    keys: Tensor | None,
    eos_token_id: int | None,
    alg_temp: float,
) -> tuple[Tensor, Tensor]:
    """The new tokens [P, S] and which of the N candidates were committed, bool [N].

    Row n of trajectory p (``splits[p] <= n < splits[p + 1]``) proposes ``candidates[n]`` at column
    ``positions[n]``; the ``counts[p]`` most confident are written, the earlier row first among equals. Rows of no
    trajectory (before ``splits[0]``, from ``splits[P]`` on) change nothing, whatever they hold.
    """
    score = confidence.clone()
    score[torch.isnan(score)] = -math.inf
    if eos_token_id is not None:
        score[candidates == eos_token_id] = -math.inf
    if alg_temp > 0:
        assert keys is not None
        noise = gumbel(keys, torch.zeros(1, dtype=torch.long, device=keys.device))[:, 0]
        score = score / max(alg_temp, 1e-30) + noise.to(score.dtype)
    tokens, committed = tokens.clone(), torch.zeros_like(candidates, dtype=torch.bool)
    for p in range(tokens.shape[0]):
        rows = torch.arange(int(splits[p]), int(splits[p + 1]), device=tokens.device)
        rows = rows[candidates[rows] >= 0]
        best = rows[torch.sort(score[rows], descending=True, stable=True).indices][: int(counts[p])]
        tokens[p, positions[best]] = candidates[best]
        committed[best] = True
    return tokens, committed
