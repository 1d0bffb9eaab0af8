"""What comes out of each operator, from shapes and dtypes alone: for meta tensors, FakeTensor and torch.compile.

A fake refuses what the operator refuses, in the same words: the checks of ``csrc/ops``, in the same order.
Beyond them lie what only memory can tell (arguments that share it) and what only data can (ids out of range).

Arguments are known by the names of the schema: one that is not checked is not mentioned here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

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
# ``a`` holds the arguments of a call by their names, and these checks take one of them by its name.


def _on_device(a: SimpleNamespace, name: str, like: Tensor) -> None:
    t = getattr(a, name)
    _check(t.device == like.device, lambda: f"{name} must be on {like.device}, got {describe(t)}")


def _floating(a: SimpleNamespace, name: str) -> None:
    t = getattr(a, name)
    if t.device.type in ("cpu", "meta"):
        expected, allowed = "bfloat16, float16, float32 or float64", (*HALF_OR_SINGLE, torch.float64)
    else:
        expected, allowed = "bfloat16, float16 or float32 on this device", HALF_OR_SINGLE
    _check(t.dtype in allowed, lambda: f"{name} must be {expected}, got {describe(t)}")


def _inner_stride(a: SimpleNamespace, name: str) -> None:
    t = getattr(a, name)
    _check(
        _any(t.stride(-1) == 1, t.shape[-1] == 1, t.numel() == 0),
        lambda: f"{name} must be contiguous in its last dimension, got stride {t.stride(-1)} ({describe(t)})",
    )


def _rows_disjoint(a: SimpleNamespace, name: str) -> None:
    t = getattr(a, name)
    _check(
        _any(t.shape[0] <= 1, t.numel() == 0, t.stride(0) >= t.shape[1]),
        lambda: (
            f"{name} is written in place and its rows must not overlap, got row stride {t.stride(0)} ({describe(t)})"
        ),
    )


def _matrix(a: SimpleNamespace, name: str, rows, columns, dtype: torch.dtype, like: Tensor) -> None:
    t = getattr(a, name)
    if t is None:
        return
    _on_device(a, name, like)
    _check(
        t.dim() == 2 and _all(t.shape[0] == rows, t.shape[1] == columns) and t.dtype == dtype,
        lambda: f"{name} must be {name_of(dtype)} [{rows}, {columns}], got {describe(t)}",
    )
    _inner_stride(a, name)


def _vector(a: SimpleNamespace, name: str, length, dtype: torch.dtype, like: Tensor) -> None:
    t = getattr(a, name)
    if t is None:
        return
    _on_device(a, name, like)
    _check(
        t.dim() == 1 and _holds(t.shape[0] == length) and t.dtype == dtype,
        lambda: f"{name} must be {name_of(dtype)} [{length}], got {describe(t)}",
    )


def _row_values(a: SimpleNamespace, *names: str) -> None:
    for name in names:
        _vector(a, name, a.logits.shape[0], accumulator_dtype(a.logits), a.logits)


def _logits(a: SimpleNamespace) -> None:
    logits = a.logits
    _check(logits.dim() == 2, lambda: f"logits must be a matrix [N, V], got {describe(logits)}")
    _floating(a, "logits")
    _check(
        _holds(logits.shape[1] >= 1),
        lambda: f"logits must have a vocabulary of at least one id (V >= 1), got {describe(logits)}",
    )
    _check(
        _holds(logits.shape[1] <= MAX_VOCABULARY),
        lambda: f"logits must have a vocabulary of at most {MAX_VOCABULARY} ids, got {describe(logits)}",
    )
    _inner_stride(a, "logits")


def _keys(a: SimpleNamespace, rows, like: Tensor) -> None:
    _matrix(a, "keys", rows, 4, torch.int64, like)


def _forbidden(a: SimpleNamespace) -> None:
    forbidden, vocabulary = a.forbidden, a.logits.shape[1]
    if forbidden is None:
        return
    _on_device(a, "forbidden", a.logits)
    _check(
        forbidden.dim() == 1
        and (
            forbidden.dtype == torch.int32
            or (forbidden.dtype == torch.bool and _holds(forbidden.shape[0] == vocabulary))
        ),
        lambda: f"forbidden must be bool [{vocabulary}], or int32 [F], their ids, got {describe(forbidden)}",
    )


def _embedding(a: SimpleNamespace) -> None:
    embedding, logits = a.embedding, a.logits
    _check(
        embedding.dim() == 2 and _holds(embedding.shape[0] == logits.shape[1]),
        lambda: f"embedding must be [V, d] with V = {logits.shape[1]} as in logits, got {describe(embedding)}",
    )
    _check(
        _holds(embedding.shape[1] >= 1),
        lambda: f"embedding must have at least one column (d >= 1), got {describe(embedding)}",
    )
    _on_device(a, "embedding", logits)
    _floating(a, "embedding")
    _check(
        (embedding.dtype == torch.float64) == (logits.dtype == torch.float64),
        lambda: (
            f"embedding must be float64 exactly where logits are: logits are {name_of(logits.dtype)}, "
            f"got {describe(embedding)}"
        ),
    )
    _inner_stride(a, "embedding")


def _target(a: SimpleNamespace, name: str) -> None:
    target, n = getattr(a, name), a.logits.shape[0]
    _vector(a, "row_index", n, torch.int64, a.logits)
    if a.row_index is None:
        _check(
            target.dim() == 2 and _holds(target.shape[0] == n),
            lambda: (
                f"{name} must have {n} rows (one for each row of logits) when row_index is None, got {describe(target)}"
            ),
        )
    _check(target.dim() == 2, lambda: f"{name} must be a matrix [R, d], got {describe(target)}")
    _matrix(a, name, target.shape[0], a.embedding.shape[1], a.embedding.dtype, a.logits)


def _soft(a: SimpleNamespace) -> None:
    _matrix(a, "soft", a.logits.shape[0], a.embedding.shape[1], accumulator_dtype(a.logits), a.logits)


# ---- what several operators check ------------------------------------------------------------------------------


def _statistics(a: SimpleNamespace) -> None:
    _logits(a)
    _temperature(a.temperature)


def _relaxation(a: SimpleNamespace) -> None:
    _statistics(a)
    _row_values(a, "logsumexp")
    _embedding(a)


def _blend(a: SimpleNamespace) -> None:
    _vector(a, "hard_tokens", a.logits.shape[0], torch.int64, a.logits)
    _row_values(a, "weight")
    _check(a.weight is None or a.hard_tokens is not None, lambda: "weight must be None when hard_tokens is None")


def _update(a: SimpleNamespace) -> None:
    _relaxation(a)
    _target(a, "grad")
    _soft(a)


def _step(a: SimpleNamespace) -> None:
    _update(a)
    _rows_disjoint(a, "logits")
    _check(math.isfinite(a.lr), lambda: f"lr must be finite, got {a.lr:g}")


def _empty_vector(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((like.shape[0],), dtype=dtype)


def _accumulator_rows(logits: Tensor) -> Tensor:
    """acc [N, V] whose rows start at 16-byte boundaries."""
    dtype = accumulator_dtype(logits)
    step = 16 // dtype.itemsize
    stride = (logits.shape[1] + step - 1) // step * step
    return logits.new_empty_strided(logits.shape, (stride, 1), dtype=dtype)


# ---- the fakes -----------------------------------------------------------------------------------------------


def logit_statistics(a):
    _statistics(a)
    acc = accumulator_dtype(a.logits)
    return tuple(_empty_vector(a.logits, dtype) for dtype in (acc, acc, acc, torch.int64))


def logit_statistics_backward(a):
    _statistics(a)
    _row_values(a, "grad_logsumexp", "grad_entropy", "grad_tempered_entropy")
    _row_values(a, "logsumexp", "unit_logsumexp", "entropy", "tempered_entropy")
    return a.logits.new_empty(a.logits.shape)


def sample_tokens(a):
    _statistics(a)
    _check(0 <= a.top_p <= 1, lambda: f"top_p must be in [0, 1], got {a.top_p:g}")
    _check(a.top_k is None or _holds(a.top_k >= 1), lambda: f"top_k must be >= 1 or None, got {a.top_k}")
    _keys(a, a.logits.shape[0], a.logits)
    _forbidden(a)
    _vector(a, "error_flag", 1, torch.int32, a.logits)
    acc = accumulator_dtype(a.logits)
    return tuple(_empty_vector(a.logits, t) for t in (acc, acc, acc, torch.int64, torch.int64, acc, acc, acc))


def gumbel_perturb(a):
    _logits(a)
    _keys(a, a.logits.shape[0], a.logits)
    _check(0 <= a.scale <= 1e6, lambda: f"scale must be between 0 and 1e6, got {a.scale:g}")
    return _accumulator_rows(a.logits)


def relaxed_embedding(a):
    _relaxation(a)
    _blend(a)
    shape = (a.logits.shape[0], a.embedding.shape[1])
    return a.embedding.new_empty(shape), a.embedding.new_empty(shape, dtype=accumulator_dtype(a.logits))


def relaxed_embedding_(a):
    _relaxation(a)
    _blend(a)
    _target(a, "output")
    _rows_disjoint(a, "output")
    _soft(a)
    _rows_disjoint(a, "soft")


def logit_gradient(a):
    _update(a)
    return _accumulator_rows(a.logits)


def adam_step_(a):
    _step(a)
    _check(0 <= a.beta1 < 1, lambda: f"beta1 must be in [0, 1), got {a.beta1:g}")
    _check(0 <= a.beta2 < 1, lambda: f"beta2 must be in [0, 1), got {a.beta2:g}")
    _check(math.isfinite(a.eps) and a.eps >= 0, lambda: f"eps must be >= 0 and finite, got {a.eps:g}")
    _check(_holds(a.step >= 1), lambda: f"step counts from 1, got {a.step}")
    if a.exp_avg is None or a.exp_avg_sq is None:
        _check(
            _holds(a.step == 1) and a.last,
            lambda: (
                f"exp_avg and exp_avg_sq may be None only when step == 1 and last, got step {a.step}, "
                f"last {'true' if a.last else 'false'}"
            ),
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if getattr(a, name) is not None:
            _matrix(a, name, a.logits.shape[0], a.logits.shape[1], accumulator_dtype(a.logits), a.logits)
            _rows_disjoint(a, name)


def sgd_step_(a):
    _step(a)


def commit_(a):
    tokens, confidence = a.tokens, a.confidence
    _check(tokens.dim() == 2, lambda: f"tokens must be a matrix [P, S], got {describe(tokens)}")
    _matrix(a, "tokens", tokens.shape[0], tokens.shape[1], torch.int64, tokens)
    _rows_disjoint(a, "tokens")
    _check(a.candidates.dim() == 1, lambda: f"candidates must be a vector [N], got {describe(a.candidates)}")
    trajectories, n = tokens.shape[0], a.candidates.shape[0]
    _vector(a, "candidates", n, torch.int64, tokens)
    _vector(a, "committed", n, torch.bool, tokens)
    _check(
        _any(n <= 1, a.committed.stride(0) == 1),
        lambda: f"committed must be contiguous, got stride {a.committed.stride(0)}",
    )
    is_double = confidence.dtype == torch.float64 and confidence.device.type in ("cpu", "meta")
    _vector(a, "confidence", n, torch.float64 if is_double else torch.float32, tokens)
    _vector(a, "positions", n, torch.int64, tokens)
    _vector(a, "splits", trajectories + 1, torch.int64, tokens)
    _vector(a, "counts", trajectories, torch.int64, tokens)
    _check(
        math.isfinite(a.alg_temp) and a.alg_temp >= 0, lambda: f"alg_temp must be >= 0 and finite, got {a.alg_temp:g}"
    )
    _check(
        a.alg_temp == 0 or a.keys is not None,
        lambda: f"keys must be given when alg_temp > 0, got None with alg_temp {a.alg_temp:g}",
    )
    _keys(a, n, tokens)


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
        overload = getattr(torch.ops.entrgi, fake.__name__).default
        arguments = overload._schema.arguments
        names = [argument.name for argument in arguments]
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

        def call(*args, fake=fake, names=names, defaults=defaults, **keywords):
            return fake(SimpleNamespace(**{**defaults, **dict(zip(names, args, strict=False)), **keywords}))

        torch.library.register_fake(overload, call)
