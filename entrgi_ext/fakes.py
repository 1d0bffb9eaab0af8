"""What comes out of each operator, from shapes and dtypes alone: for meta tensors, FakeTensor and torch.compile.

A fake refuses what the operator refuses, in the same words: the checks of ``csrc/ops/checks.h``, in the same order.
Beyond them lie what only memory can tell (arguments that share it) and what only data can (ids out of range).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from .reference import accumulator_dtype

MAX_VOCABULARY = 2**23
HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
# What torch calls the dtypes that no argument may have.
DTYPE_NAMES = {
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def name_of(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def describe(t: Tensor) -> str:
    """``float32 [4, 7] on cpu``"""
    return f"{name_of(t.dtype)} [{', '.join(str(size) for size in t.shape)}] on {t.device}"


def _holds(condition) -> bool:
    """Sizes known only at run time pass here: the operator itself checks them."""
    return guard_or_true(condition) if isinstance(condition, torch.SymBool) else bool(condition)


def _all(*conditions) -> bool:
    return all(_holds(condition) for condition in conditions)


def _any(*conditions) -> bool:
    return any(_holds(condition) for condition in conditions)


def _check(passed: bool, message: Callable[[], str]) -> None:
    if not passed:
        raise RuntimeError(message())


# ---- scalars -------------------------------------------------------------------------------------------------


def _temperature(x: float) -> None:
    _check(math.isfinite(x) and x > 0, lambda: f"temperature must be > 0 and finite, got {x:g}")
    _check(1e-6 <= x <= 1e6, lambda: f"temperature must be between 1e-6 and 1e6, got {x:g}")


# ---- tensors -------------------------------------------------------------------------------------------------


def _on_device(name: str, t: Tensor, like: Tensor) -> None:
    _check(t.device == like.device, lambda: f"{name} must be on {like.device}, got {describe(t)}")


def _floating(name: str, t: Tensor) -> None:
    if t.device.type in ("cpu", "meta"):
        expected, allowed = "bfloat16, float16, float32 or float64", (*HALF_OR_SINGLE, torch.float64)
    else:
        expected, allowed = "bfloat16, float16 or float32 on this device", HALF_OR_SINGLE
    _check(t.dtype in allowed, lambda: f"{name} must be {expected}, got {describe(t)}")


def _inner_stride(name: str, t: Tensor) -> None:
    _check(
        _any(t.stride(-1) == 1, t.shape[-1] == 1, t.numel() == 0),
        lambda: f"{name} must be contiguous in its last dimension, got stride {t.stride(-1)} ({describe(t)})",
    )


def _rows_disjoint(name: str, t: Tensor) -> None:
    _check(
        _any(t.shape[0] <= 1, t.numel() == 0, t.stride(0) >= t.shape[1]),
        lambda: (
            f"{name} is written in place and its rows must not overlap, got row stride {t.stride(0)} ({describe(t)})"
        ),
    )


def _matrix(name: str, t: Tensor, rows, columns, dtype: torch.dtype, like: Tensor) -> None:
    _on_device(name, t, like)
    _check(
        t.dim() == 2 and _all(t.shape[0] == rows, t.shape[1] == columns) and t.dtype == dtype,
        lambda: f"{name} must be {name_of(dtype)} [{rows}, {columns}], got {describe(t)}",
    )
    _inner_stride(name, t)


def _vector(name: str, t: Tensor | None, length, dtype: torch.dtype, like: Tensor) -> None:
    if t is None:
        return
    _on_device(name, t, like)
    _check(
        t.dim() == 1 and _holds(t.shape[0] == length) and t.dtype == dtype,
        lambda: f"{name} must be {name_of(dtype)} [{length}], got {describe(t)}",
    )


def _logits(logits: Tensor) -> None:
    _check(logits.dim() == 2, lambda: f"logits must be a matrix [N, V], got {describe(logits)}")
    _floating("logits", logits)
    _check(
        _holds(logits.shape[1] >= 1),
        lambda: f"logits must have a vocabulary of at least one id (V >= 1), got {describe(logits)}",
    )
    _check(
        _holds(logits.shape[1] <= MAX_VOCABULARY),
        lambda: f"logits must have a vocabulary of at most {MAX_VOCABULARY} ids, got {describe(logits)}",
    )
    _inner_stride("logits", logits)


def _embedding(embedding: Tensor, logits: Tensor) -> None:
    _check(
        embedding.dim() == 2 and _holds(embedding.shape[0] == logits.shape[1]),
        lambda: f"embedding must be [V, d] with V = {logits.shape[1]} as in logits, got {describe(embedding)}",
    )
    _check(
        _holds(embedding.shape[1] >= 1),
        lambda: f"embedding must have at least one column (d >= 1), got {describe(embedding)}",
    )
    _on_device("embedding", embedding, logits)
    _floating("embedding", embedding)
    _check(
        (embedding.dtype == torch.float64) == (logits.dtype == torch.float64),
        lambda: (
            f"embedding must be float64 exactly where logits are: logits are {name_of(logits.dtype)}, "
            f"got {describe(embedding)}"
        ),
    )
    _inner_stride("embedding", embedding)


def _rows(rows: Tensor | None, logits: Tensor, target_name: str, target: Tensor) -> None:
    n = logits.shape[0]
    _vector("rows", rows, n, torch.int64, logits)
    if rows is None:
        _check(
            target.dim() == 2 and _holds(target.shape[0] == n),
            lambda: (
                f"{target_name} must have {n} rows (one for each row of logits) when rows is None, "
                f"got {describe(target)}"
            ),
        )


def _forbidden(forbidden: Tensor, logits: Tensor) -> None:
    _on_device("forbidden", forbidden, logits)
    vocabulary = logits.shape[1]
    _check(
        forbidden.dim() == 1
        and (
            forbidden.dtype == torch.int32
            or (forbidden.dtype == torch.bool and _holds(forbidden.shape[0] == vocabulary))
        ),
        lambda: f"forbidden must be bool [{vocabulary}], or int32 [F], their ids, got {describe(forbidden)}",
    )


# ---- one check for each operator -----------------------------------------------------------------------------


def _check_statistics(logits: Tensor, temperature: float) -> None:
    _logits(logits)
    _temperature(temperature)


def _check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature) -> None:
    _check_statistics(logits, temperature)
    n, dtype = logits.shape[0], accumulator_dtype(logits)
    _vector("logsumexp", logsumexp, n, dtype, logits)
    _embedding(embedding, logits)
    _vector("hard_tokens", hard_tokens, n, torch.int64, logits)
    _vector("weight", weight, n, dtype, logits)
    _check(weight is None or hard_tokens is not None, lambda: "weight must be None when hard_tokens is None")


def _check_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature) -> None:
    _check_relaxed_embedding(logits, logsumexp, embedding, None, None, temperature)
    _rows(rows, logits, "grad", grad)
    _check(grad.dim() == 2, lambda: f"grad must be a matrix [R, d], got {describe(grad)}")
    _matrix("grad", grad, grad.shape[0], embedding.shape[1], embedding.dtype, logits)
    _matrix("soft", soft, logits.shape[0], embedding.shape[1], accumulator_dtype(logits), logits)


def _check_step(logits, grad, logsumexp, embedding, soft, rows, temperature, lr) -> None:
    _check_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature)
    _rows_disjoint("logits", logits)
    _check(math.isfinite(lr), lambda: f"lr must be finite, got {lr:g}")


# ---- the fakes -----------------------------------------------------------------------------------------------


def _empty_vector(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((like.shape[0],), dtype=dtype)


def _accumulator_rows(logits: Tensor) -> Tensor:
    """acc [N, V] whose rows start at 16-byte boundaries."""
    dtype = accumulator_dtype(logits)
    step = 16 // dtype.itemsize
    stride = (logits.shape[1] + step - 1) // step * step
    return logits.new_empty_strided(logits.shape, (stride, 1), dtype=dtype)


def logit_statistics(logits, temperature):
    _check_statistics(logits, temperature)
    acc = accumulator_dtype(logits)
    return (*(_empty_vector(logits, acc) for _ in range(3)), _empty_vector(logits, torch.int64))


def logit_statistics_backward(
    grad_logsumexp,
    grad_entropy,
    grad_tempered_entropy,
    logits,
    logsumexp,
    unit_logsumexp,
    entropy,
    tempered_entropy,
    temperature,
):
    _check_statistics(logits, temperature)
    vectors = {
        "grad_logsumexp": grad_logsumexp,
        "grad_entropy": grad_entropy,
        "grad_tempered_entropy": grad_tempered_entropy,
        "logsumexp": logsumexp,
        "unit_logsumexp": unit_logsumexp,
        "entropy": entropy,
        "tempered_entropy": tempered_entropy,
    }
    for name, vector in vectors.items():
        _vector(name, vector, logits.shape[0], accumulator_dtype(logits), logits)
    return logits.new_empty(logits.shape)


def sample_tokens(logits, keys, temperature, top_p, top_k, forbidden, error_flag):
    _check_statistics(logits, temperature)
    _check(0 <= top_p <= 1, lambda: f"top_p must be in [0, 1], got {top_p:g}")
    _check(top_k is None or _holds(top_k >= 1), lambda: f"top_k must be >= 1 or None, got {top_k}")
    _matrix("keys", keys, logits.shape[0], 4, torch.int64, logits)
    if forbidden is not None:
        _forbidden(forbidden, logits)
    _vector("error_flag", error_flag, 1, torch.int32, logits)
    acc = accumulator_dtype(logits)
    return tuple(_empty_vector(logits, t) for t in (acc, acc, acc, torch.int64, torch.int64, acc, acc, acc))


def gumbel_perturb(logits, keys, scale):
    _logits(logits)
    _matrix("keys", keys, logits.shape[0], 4, torch.int64, logits)
    _check(0 <= scale <= 1e6, lambda: f"scale must be between 0 and 1e6, got {scale:g}")
    return _accumulator_rows(logits)


def relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature):
    _check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature)
    shape = (logits.shape[0], embedding.shape[1])
    return embedding.new_empty(shape), embedding.new_empty(shape, dtype=accumulator_dtype(logits))


def relaxed_embedding_(output, soft, logits, logsumexp, embedding, hard_tokens, weight, rows, temperature):
    _check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature)
    _rows(rows, logits, "output", output)
    _check(output.dim() == 2, lambda: f"output must be a matrix [R, d], got {describe(output)}")
    _matrix("output", output, output.shape[0], embedding.shape[1], embedding.dtype, logits)
    _rows_disjoint("output", output)
    _matrix("soft", soft, logits.shape[0], embedding.shape[1], accumulator_dtype(logits), logits)
    _rows_disjoint("soft", soft)


def logit_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature):
    _check_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature)
    return _accumulator_rows(logits)


def adam_step_(
    logits,
    exp_avg,
    exp_avg_sq,
    grad,
    logsumexp,
    embedding,
    soft,
    rows,
    temperature,
    lr,
    beta1,
    beta2,
    eps,
    step,
    last,
):
    _check_step(logits, grad, logsumexp, embedding, soft, rows, temperature, lr)
    _check(0 <= beta1 < 1, lambda: f"beta1 must be in [0, 1), got {beta1:g}")
    _check(0 <= beta2 < 1, lambda: f"beta2 must be in [0, 1), got {beta2:g}")
    _check(math.isfinite(eps) and eps >= 0, lambda: f"eps must be >= 0 and finite, got {eps:g}")
    _check(_holds(step >= 1), lambda: f"step counts from 1, got {step}")
    if exp_avg is None or exp_avg_sq is None:
        _check(
            _holds(step == 1) and last,
            lambda: (
                f"exp_avg and exp_avg_sq may be None only when step == 1 and last, got step {step}, "
                f"last {'true' if last else 'false'}"
            ),
        )
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment is not None:
            _matrix(name, moment, logits.shape[0], logits.shape[1], accumulator_dtype(logits), logits)
            _rows_disjoint(name, moment)


def sgd_step_(logits, grad, logsumexp, embedding, soft, rows, temperature, lr):
    _check_step(logits, grad, logsumexp, embedding, soft, rows, temperature, lr)


def commit_(tokens, committed, candidates, confidence, positions, splits, counts, keys, eos_token_id, alg_temp):
    _check(tokens.dim() == 2, lambda: f"tokens must be a matrix [P, S], got {describe(tokens)}")
    _matrix("tokens", tokens, tokens.shape[0], tokens.shape[1], torch.int64, tokens)
    _rows_disjoint("tokens", tokens)
    _check(candidates.dim() == 1, lambda: f"candidates must be a vector [N], got {describe(candidates)}")
    trajectories, n = tokens.shape[0], candidates.shape[0]
    _vector("candidates", candidates, n, torch.int64, tokens)
    _vector("committed", committed, n, torch.bool, tokens)
    _check(
        _any(n <= 1, committed.stride(0) == 1),
        lambda: f"committed must be contiguous, got stride {committed.stride(0)}",
    )
    is_double = confidence.dtype == torch.float64 and confidence.device.type in ("cpu", "meta")
    _vector("confidence", confidence, n, torch.float64 if is_double else torch.float32, tokens)
    _vector("positions", positions, n, torch.int64, tokens)
    _vector("splits", splits, trajectories + 1, torch.int64, tokens)
    _vector("counts", counts, trajectories, torch.int64, tokens)
    _check(math.isfinite(alg_temp) and alg_temp >= 0, lambda: f"alg_temp must be >= 0 and finite, got {alg_temp:g}")
    _check(
        alg_temp == 0 or keys is not None,
        lambda: f"keys must be given when alg_temp > 0, got None with alg_temp {alg_temp:g}",
    )
    if keys is not None:
        _matrix("keys", keys, n, 4, torch.int64, tokens)


FAKES = (
    logit_statistics,
    logit_statistics_backward,
    sample_tokens,
    gumbel_perturb,
    relaxed_embedding,
    relaxed_embedding_,
    logit_gradient,
    adam_step_,
    sgd_step_,
    commit_,
)


def register() -> None:
    for fake in FAKES:
        torch.library.register_fake(f"entrgi::{fake.__name__}", fake)
