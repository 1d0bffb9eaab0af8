"""Reward-gradient guidance: M optimiser steps on the logits of the masked positions (arXiv 2602.05000)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from entrgi.config import ESTIMATORS, OPTIMIZERS
from entrgi.deprecation import former_names, rename_option
from entrgi.rows import empty_rows
from entrgi.timing import span
from entrgi_ext import ops, reference

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam
CHUNK = 32  # rows of logits in one step of an optimiser without a kernel of its own
REWARD_NOT_FINITE = 4  # a bit of error_flag, beside those of ops.sample_tokens
RelaxedReward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GuidanceOutput:
    """What guidance saw on its way; tensors stay on the device of the logits.

    Attributes:
        rewards: [M, P], relaxed reward of each trajectory before each update.
        weights: [M, N], entropy weight w of each row (only ``entrgi`` uses it).
        initial_entropy: [N], entropy in nats at ``temperature`` of the logits as they came in, unfiltered.
    """

    rewards: Tensor
    weights: Tensor
    initial_entropy: Tensor


def _outside_inference_mode(function: Callable[..., GuidanceOutput]):
    """``function``, which differentiates, callable under inference mode, too, and by the former name of an argument.

    A tensor made under that mode is replaced by a copy, and gets back what is written into the copy.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> GuidanceOutput:
        rename_option(options, "rows", "row_index")
        if torch.compiler.is_compiling():  # where the mode cannot be asked for
            return function(*arguments, **options)
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
        if not (torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors)):
            return function(*arguments, **options)
        with torch.inference_mode(False):
            copies = {id(x): _copy(x) for x in tensors if x.is_inference()}
            replaced = [copies.get(id(x), x) for x in arguments]
            output = function(*replaced, **{name: copies.get(id(x), x) for name, x in options.items()})
        with torch.inference_mode():
            for x in tensors:
                if x.is_inference() and copies[id(x)]._version > 1:  # the first write is the copying
                    x.copy_(copies[id(x)])
        return output

    return run


def _copy(tensor: Tensor) -> Tensor:
    """A copy in the same layout: rows of logits may have room between them."""
    if 0 in tensor.stride():
        tensor = tensor.contiguous()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@_outside_inference_mode
def optimize_logits(
    logits: Tensor,
    embedding: Tensor,
    inputs_embeds: Tensor,
    row_index: Tensor,
    tokens: Tensor,
    reward: RelaxedReward,
    *,
    keys: Tensor,
    guidance: str = "entrgi",
    steps: int = 3,
    lr: float = 0.5,
    optimizer: str = "adam",
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int | None = None,
    forbidden: Tensor | None = None,
    gumbel_temperature: float = 1.0,
    reward_scale: float = 1.0,
    error_flag: Tensor | None = None,
) -> GuidanceOutput:
    """Move ``logits`` up the reward's gradient, in place, by ``steps`` steps of a fresh optimiser.

    Each step draws x ~ softmax(filter(z / tau)) anew, feeds the reward model
    q E + w (E[x] - q E) with q = softmax(z / tau), and ascends with the gradient of q E alone
    (section 4 of the paper). w = H(softmax z) / log V for ``entrgi``, 1 for ``aps``, 0 for ``expectation``.
    ``gumbel`` feeds softmax((z / tau + g) / lambda) E with fresh noise g in each step, and no hard part.
    Nothing of size [N, V] is allocated but Adam's two moments (none when ``steps`` is 1, none for SGD; ``gumbel``
    also holds the perturbed logits and their gradient), and the host never waits for the device.
    Under ``torch.inference_mode`` it works on copies of the tensors that were made there.
    ``torch.compile(optimize_logits, fullgraph=True)`` is one graph, the reward's backward included, where Dynamo may
    trace it (``torch._dynamo.config.trace_autograd_ops = True``).

    Args:
        logits: [N, V], z; bf16, fp16, fp32 (fp64 on the CPU with an fp64 embedding). Updated in place. On CUDA the
            fast kernels need rows that start at 16-byte boundaries (:mod:`entrgi.rows`); any others are slower.
        embedding: [V, d], E: row i is the reward model's embedding of the denoiser's token i.
        inputs_embeds: [P, S, d], contiguous, E's dtype: the reward model's input, with everything but the
            masked positions filled in. The rows named by ``row_index`` are overwritten in every step.
        row_index: int64 [N], which row of ``inputs_embeds`` (flattened to P * S) each row of logits feeds;
            -1 is a padding row, whose logits must be finite but otherwise do not matter.
        tokens: int64 [P, S], the committed ids where ``inputs_embeds`` holds a response. Not changed:
            the reward gets a copy that has argmax z at the masked positions, for its end-of-sequence mask.
        reward: (inputs_embeds [P, S, d], tokens [P, S]) -> rewards [P], differentiable in the first. Its
            parameters should be frozen.
        keys: int64 [N, 4], (trajectory seed, denoising step, anything, absolute position) of every row; the
            third column is replaced by the optimiser step 0 ... M-1.
        guidance: ``entrgi``, ``aps``, ``expectation`` or ``gumbel``.
        steps: M, >= 1.
        lr: the learning rate; of Adam in logits, of SGD in logits per unit of gradient.
        optimizer: ``adam`` or ``sgd``.
        temperature, top_p, top_k, forbidden: of the draws, see :func:`entrgi_ext.sample_tokens`.
        gumbel_temperature: lambda.
        reward_scale: factor on the reward before its gradient is taken.
        error_flag: int32 [1], see :func:`entrgi_ext.sample_tokens`; value 4 is added where a reward
            is the first thing not to be finite.

    Returns:
        :class:`GuidanceOutput`.

    Raises:
        ValueError: for an unknown estimator or optimiser, a shape that does not fit, or a ``reward`` that returns
            another shape or is not differentiable.
        RuntimeError: from the operators, for invalid dtypes, devices or (on the CPU) invalid rows.
    """
    _check(logits, embedding, inputs_embeds, row_index, tokens, keys, guidance, optimizer, steps)
    count, width = logits.shape
    flat = inputs_embeds.view(-1, inputs_embeds.shape[-1])
    # Padding rows scatter their argmax into one slot past the end.
    argmax_slot = torch.where(row_index < 0, tokens.numel(), row_index)
    seen = torch.cat([tokens.reshape(-1), tokens.new_zeros(1)])
    keys = keys.clone()
    scale = torch.full((inputs_embeds.shape[0],), reward_scale, dtype=torch.float64, device=logits.device)

    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    soft = torch.zeros(count, embedding.shape[1], dtype=accumulator, device=logits.device)
    adam: dict[str, Any] = {"lr": lr, "betas": BETAS, "eps": EPS}
    needs_moments = optimizer == "adam" and steps > 1
    exp_avg, exp_avg_sq = (
        empty_rows(count, width, accumulator, logits.device) if needs_moments else None for _ in "mv"
    )
    rewards, weights, initial_entropy = [], [], None

    for m in range(steps):
        keys[:, 2].fill_(m)
        if guidance in ("entrgi", "aps"):
            with span("sample_tokens"):
                statistics = ops.sample_tokens(logits, keys, temperature, top_p, top_k, forbidden, error_flag)
            x = statistics.token
        else:
            with span("logit_statistics"):
                statistics = ops.logit_statistics(logits, temperature)
            x = None
        w = statistics.entropy / math.log(width) if width > 1 else torch.zeros_like(statistics.entropy)
        if m == 0:
            initial_entropy = statistics.tempered_entropy

        relaxed, tau, logsumexp = logits, temperature, statistics.logsumexp
        if guidance == "gumbel":
            tau = temperature * gumbel_temperature
            with span("gumbel_perturb"):
                relaxed = ops.gumbel_perturb(logits, keys, temperature)
            with span("logit_statistics"):
                logsumexp = ops.logit_statistics(relaxed, tau).logsumexp
        with span("relaxed_embedding"):
            blend = {"hard_tokens": x, "weight": w if guidance == "entrgi" else None, "row_index": row_index}
            ops.relaxed_embedding_(flat, soft, relaxed, logsumexp, embedding, tau, **blend)

        seen[argmax_slot] = statistics.argmax
        leaf = inputs_embeds.detach().requires_grad_()
        with span("reward forward"), torch.enable_grad():
            value = reward(leaf, seen[:-1].view(tokens.shape))
            _check_reward(value, scale)
        with span("reward backward"):
            (gradient,) = torch.autograd.grad(value, leaf, scale.to(value.dtype))
        if error_flag is not None:
            # After invalid logits it is only a consequence.
            error_flag |= (~value.detach().isfinite().all() & (error_flag == 0)) * REWARD_NOT_FINITE

        gradient = gradient.contiguous().view(flat.shape)
        with span("logit_update"):
            if guidance == "gumbel":
                slope = ops.logit_gradient(gradient, relaxed, logsumexp, embedding, soft, tau, row_index=row_index)
                _step_with_gradient_(logits, (exp_avg, exp_avg_sq), slope, optimizer, lr, m + 1)
            elif optimizer == "sgd":
                ops.sgd_step_(logits, gradient, logsumexp, embedding, soft, tau, lr=lr, row_index=row_index)
            else:
                adam |= {"step": m + 1, "last": m + 1 == steps, "row_index": row_index}
                ops.adam_step_(logits, exp_avg, exp_avg_sq, gradient, logsumexp, embedding, soft, tau, **adam)
        rewards.append(value.detach())
        weights.append(w)
    assert initial_entropy is not None
    return GuidanceOutput(torch.stack(rewards), torch.stack(weights), initial_entropy)


ascend = optimize_logits.__wrapped__  # the same for a caller who has left inference mode


def _step_with_gradient_(
    logits: Tensor, moments: tuple[Tensor | None, Tensor | None], gradient: Tensor, optimizer: str, lr: float, step: int
) -> None:
    """One optimiser step on ``logits`` where the gradient was taken at others, the perturbed ones."""
    if optimizer == "sgd":
        logits.add_(gradient, alpha=lr)
        return
    for begin in range(0, logits.shape[0], CHUNK):  # what a step leaves aside is then of a few rows, not [N, V]
        part = slice(begin, begin + CHUNK)
        z, (m, v) = logits[part], (None if x is None else x[part] for x in moments)
        new = reference.adam_step(z, m, v, gradient[part], lr, *BETAS, EPS, step)
        for old, value in zip((z, m, v), new, strict=True):
            if old is not None:
                old.copy_(value)


def _check(
    logits: Tensor,
    embedding: Tensor,
    inputs_embeds: Tensor,
    row_index: Tensor,
    tokens: Tensor,
    keys: Tensor,
    guidance: str,
    optimizer: str,
    steps: int,
) -> None:
    if guidance not in ESTIMATORS:
        raise ValueError(f"guidance must be one of {', '.join(ESTIMATORS)}, got {guidance!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if logits.dim() != 2 or embedding.dim() != 2 or inputs_embeds.dim() != 3:
        shapes = f"{list(logits.shape)}, {list(embedding.shape)}, {list(inputs_embeds.shape)}"
        raise ValueError(f"logits, embedding, inputs_embeds must be [N, V], [V, d], [P, S, d], got {shapes}")
    if not inputs_embeds.is_contiguous() or inputs_embeds.requires_grad:
        raise ValueError("inputs_embeds must be contiguous and must not require a gradient")
    count, width = logits.shape
    expected = {
        "embedding": (embedding, (width, inputs_embeds.shape[2])),
        "row_index": (row_index, (count,)),
        "tokens": (tokens, tuple(inputs_embeds.shape[:2])),
        "keys": (keys, (count, 4)),
    }
    if tokens.dtype != torch.long:
        raise ValueError(f"tokens must be int64, got {tokens.dtype}")
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_reward(value: Tensor, scale: Tensor) -> None:
    if value.shape != scale.shape:
        raise ValueError(f"reward must return shape {list(scale.shape)}, got {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("reward must be differentiable in inputs_embeds, got a value without a gradient")


__getattr__ = former_names(__name__, {"GuidanceTrace": "entrgi.guidance.GuidanceOutput"})
