"""The operators of this package, as the sampler calls them. Every function gives the call for one set of inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import entrgi_ext as ops

from .cases import BETAS, EPS, STEP, TEMPERATURE, TOP_P, Inputs

Call = Callable[[], dict[str, Tensor]]


def logit_statistics(x: Inputs, s: int) -> Call:
    z = x.logits[s]
    return lambda: ops.logit_statistics(z, TEMPERATURE)._asdict()


def sample_tokens(x: Inputs, s: int) -> Call:
    z, keys = x.logits[s], x.keys
    return lambda: ops.sample_tokens(z, keys, TEMPERATURE, TOP_P)._asdict()


def greedy(x: Inputs, s: int) -> Call:
    z, keys = x.logits[s], x.keys
    return lambda: ops.sample_tokens(z, keys, TEMPERATURE, 0.0)._asdict()


def relaxed_embedding(x: Inputs, s: int) -> Call:
    z, lse, e, tokens, weight = x.logits[s], x.logsumexp[s], x.embedding, x.tokens, x.weight
    output, soft = torch.empty_like(x.grad), torch.empty(x.grad.shape, device=x.device)

    def call() -> dict[str, Tensor]:
        ops.relaxed_embedding_(output, soft, z, lse, e, TEMPERATURE, hard_tokens=tokens, weight=weight)
        return {"output": output, "soft": soft}

    return call


def logit_gradient(x: Inputs, s: int) -> Call:
    z, lse, e, g, soft = x.logits[s], x.logsumexp[s], x.embedding, x.grad, x.soft
    return lambda: {"gradient": ops.logit_gradient(g, z, lse, e, soft, TEMPERATURE)}


def adam_step(x: Inputs, s: int, step: int = STEP, last: bool = False) -> Call:
    z, lse, e, g, soft, lr = x.own_logits(s), x.logsumexp[s], x.embedding, x.grad, x.soft, x.lr
    m, v = x.moments(torch.float32)

    def call() -> dict[str, Tensor]:
        ops.adam_step_(
            z, m, v, g, lse, e, soft, TEMPERATURE, lr=lr, step=step, last=last, betas=BETAS, eps=EPS
        )  # fmt: skip
        return {"logits": z} if last else {"logits": z, "exp_avg": m}

    return call


def adam_step_first(x: Inputs, s: int) -> Call:
    return adam_step(x, s, step=1)


def adam_step_last(x: Inputs, s: int) -> Call:
    return adam_step(x, s, last=True)


def sgd_step(x: Inputs, s: int) -> Call:
    z, lse, e, g, soft, lr = x.own_logits(s), x.logsumexp[s], x.embedding, x.grad, x.soft, x.lr

    def call() -> dict[str, Tensor]:
        ops.sgd_step_(z, g, lse, e, soft, TEMPERATURE, lr=lr)
        return {"logits": z}

    return call


def gumbel_perturb(x: Inputs, s: int) -> Call:
    z, keys = x.logits[s], x.keys
    return lambda: {"perturbed": ops.gumbel_perturb(z, keys, TEMPERATURE)}


def commit(x: Inputs, _s: int) -> Call:
    arguments, committed = x.commit, torch.zeros(x.case.N, dtype=torch.bool, device=x.device)
    tokens = arguments["tokens"].clone()
    others = [arguments[name] for name in ("candidates", "confidence", "positions", "splits", "counts")]

    def call() -> dict[str, Tensor]:
        ops.commit_(tokens, committed, *others)
        return {"tokens": tokens}

    return call


def adam_iteration(x: Inputs, s: int) -> Call:
    z, e, g, keys, lr = x.own_logits(s), x.embedding, x.grad, x.keys, x.lr
    m, v = x.moments(torch.float32)
    output, soft = torch.empty_like(g), torch.empty(g.shape, device=x.device)

    def call() -> dict[str, Tensor]:
        sample = ops.sample_tokens(z, keys, TEMPERATURE, TOP_P)
        ops.relaxed_embedding_(
            output, soft, z, sample.logsumexp, e, TEMPERATURE,
            hard_tokens=sample.token, weight=sample.entropy / x.log_vocabulary,
        )  # fmt: skip
        ops.adam_step_(z, m, v, g, sample.logsumexp, e, soft, TEMPERATURE, lr=lr, step=STEP, betas=BETAS, eps=EPS)
        return {"logits": z, "exp_avg": m, "soft": soft, "entropy": sample.entropy, "token": sample.token}

    return call


CALLS = {
    "logit_statistics": logit_statistics,
    "sample_tokens": sample_tokens,
    "greedy": greedy,
    "relaxed_embedding": relaxed_embedding,
    "logit_gradient": logit_gradient,
    "adam_step_first": adam_step_first,
    "adam_step_middle": adam_step,
    "adam_step_last": adam_step_last,
    "sgd_step": sgd_step,
    "gumbel_perturb": gumbel_perturb,
    "commit": commit,
    "adam_iteration": adam_iteration,
}
