"""One valid call of every operator, as keyword arguments of its Python function: the start of the tests of bad input,
of determinism, and of registration."""

from __future__ import annotations

import inspect

import torch

import entrgi_ext
from entrgi_ext import reference
from support.helpers import logsumexp, random_embedding, random_keys, random_logits

N, V, D, P, S = 5, 37, 8, 2, 6
OPERATORS = (
    "logit_statistics",
    "sample_tokens",
    "gumbel_perturb",
    "relaxed_embedding",
    "relaxed_embedding_",
    "logit_gradient",
    "adam_step_",
    "sgd_step_",
    "commit_",
)


def arguments(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, n: int = N, v: int = V, d: int = D):
    """Every optional tensor is given; rows skip some of the 7 rows of output and grad, and pad the last."""
    logits = random_logits(n, v, dtype, device)
    lse = logsumexp(logits, 0.7)
    embedding = random_embedding(v, d, dtype, device)
    soft = random_embedding(n, d, lse.dtype, device, seed=4)
    rows = torch.arange(n, device=device) + 2
    rows[-1:] = -1
    many = random_embedding(n + 2, d, dtype, device, seed=5)
    hard = torch.arange(n, device=device) % v
    weight = torch.linspace(0, 1, n, dtype=lse.dtype, device=device)
    update = {
        "grad": many,
        "logits": logits,
        "logsumexp": lse,
        "embedding": embedding,
        "soft": soft,
        "temperature": 0.7,
        "row_index": rows,
    }
    moments = {
        key: random_logits(n, v, lse.dtype, device, seed=seed).square()
        for seed, key in enumerate(("exp_avg", "exp_avg_sq"))
    }
    blend = {"hard_tokens": hard, "weight": weight}
    return {
        "logit_statistics": {"logits": logits, "temperature": 0.7},
        "sample_tokens": {
            "logits": logits,
            "keys": random_keys(n, device),
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "forbidden": torch.arange(v, device=device) % 4 == 1,
            "error_flag": torch.zeros(1, dtype=torch.int32, device=device),
        },
        "gumbel_perturb": {"logits": logits, "keys": random_keys(n, device), "scale": 0.7},
        "relaxed_embedding": {
            "logits": logits,
            "embedding": embedding,
            "temperature": 0.7,
            "logsumexp": lse,
            **blend,
        },
        "relaxed_embedding_": {
            "output": many,
            "soft": soft,
            "logits": logits,
            "logsumexp": lse,
            "embedding": embedding,
            "temperature": 0.7,
            "row_index": rows,
            **blend,
        },
        "logit_gradient": update,
        "adam_step_": {**update, **moments, "lr": 0.5, "step": 2},
        "sgd_step_": {**update, "lr": 0.5},
        "commit_": {
            "tokens": torch.full((P, S), 99, device=device),
            "committed": torch.zeros(n, dtype=torch.bool, device=device),
            "candidates": torch.arange(n, device=device),
            "confidence": torch.linspace(0, 1, n, dtype=lse.dtype, device=device),
            "positions": torch.arange(n, device=device) % S,
            "splits": torch.tensor([0, n // 2, n], device=device),
            "counts": torch.ones(P, dtype=torch.int64, device=device),
            "keys": random_keys(n, device),
            "eos_token_id": 3,
            "alg_temp": 0.5,
        },
    }[name]


def call(name: str, keywords: dict):
    return getattr(entrgi_ext, name)(**keywords)


# What an in-place operator (or an error flag) writes.
WRITTEN = {
    "sample_tokens": ["error_flag"],
    "relaxed_embedding_": ["output", "soft"],
    "adam_step_": ["logits", "exp_avg", "exp_avg_sq"],
    "sgd_step_": ["logits"],
    "commit_": ["tokens", "committed"],
}


def names_of(name: str) -> list[str]:
    """The arguments of ``torch.ops.entrgi.<name>`` in its order, which differs from that of the Python function."""
    entrgi_ext.logit_statistics  # noqa: B018 (loads the library)
    return [argument.name for argument in getattr(torch.ops.entrgi, name).default._schema.arguments]


def schema_arguments(name: str, keywords: dict) -> tuple:
    """The positional arguments of ``torch.ops.entrgi.<name>`` for the same call."""
    parameters = inspect.signature(getattr(entrgi_ext, name)).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty} | keywords
    if "betas" in given:
        given["beta1"], given["beta2"] = given["betas"]
    return tuple(given[key] for key in names_of(name))


def backward_arguments(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """A call of ``torch.ops.entrgi.logit_statistics_backward``, which has no Python function."""
    logits = random_logits(N, V, dtype, device)
    s, unit = (reference.logit_statistics(logits, temperature) for temperature in (0.7, 1.0))
    grads = random_logits(3, N, s.logsumexp.dtype, device, seed=6).unbind()
    return (*grads, logits, s.logsumexp, unit.logsumexp, s.entropy, s.tempered_entropy, 0.7)


def operator_schemas() -> dict[str, torch.FunctionSchema]:
    """The schemas of all operators that take tensors, by name."""
    entrgi_ext.logit_statistics  # noqa: B018 (loads the library)
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("entrgi::")]
    return {
        schema.name.removeprefix("entrgi::"): schema
        for schema in schemas
        if any("Tensor" in str(argument.type) for argument in schema.arguments)
    }
