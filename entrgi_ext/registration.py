"""Loads the operator libraries and tells torch what C++ cannot: fakes and autograd.

Importing this module loads ``libentrgi_cpu.so`` (schemas and CPU kernels; an :class:`ImportError` where it is
missing) and, under a torch that has CUDA, ``libentrgi_cuda.so`` (where that fails the reason is kept for
:func:`loaded_libraries`, and the CPU operators work without it).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .reference import accumulator_dtype

MINIMUM_TORCH = (2, 10)
_FOLDER = Path(__file__).parent
_problems: dict[str, str | None] = {}


def loaded_libraries() -> dict[str, str | None]:
    """``{"cpu": None, "cuda": None}`` where both libraries are loaded; otherwise, in place of None, why not."""
    return dict(_problems)


def _load(device: str) -> None:
    torch.ops.load_library(str(_FOLDER / f"libentrgi_{device}.so"))
    _problems[device] = None


def _load_libraries() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < MINIMUM_TORCH:
        raise ImportError(f"entrgi_ext needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.__version__}")
    if not (_FOLDER / "libentrgi_cpu.so").exists():
        raise ImportError(
            f"entrgi_ext is not built: libentrgi_cpu.so is missing from {_FOLDER}; "
            "install the package (pip install .) or run `make build` in a source tree"
        )
    try:
        _load("cpu")
    except OSError as error:
        raise ImportError(
            f"libentrgi_cpu.so does not load under torch {torch.__version__}: {error}; rebuild the package"
        ) from error

    if torch.version.cuda is None:
        _problems["cuda"] = f"torch {torch.__version__} is built without CUDA"
    elif not (_FOLDER / "libentrgi_cuda.so").exists():
        _problems["cuda"] = "libentrgi_cuda.so was not built (no nvcc at build time, or ENTRGI_CUDA=0)"
    else:
        try:
            _load("cuda")
        except (OSError, RuntimeError) as error:
            _problems["cuda"] = str(error)


_load_libraries()
_ops = torch.ops.entrgi


# ---- fakes: what comes out, from shapes and dtypes alone ---------------------------------------------------


def _fake(name: str):
    """Registers a fake that insists on one device: it also serves meta tensors, which win the dispatch."""

    def register(fake):
        names = [argument.name for argument in getattr(_ops, name).default._schema.arguments]

        def checked(*args):
            tensors = [(n, x) for n, x in zip(names, args, strict=True) if isinstance(x, Tensor)]
            first, like = tensors[0]
            for other, tensor in tensors:
                if tensor.device != like.device:
                    raise RuntimeError(
                        f"{other} must be on {like.device} as {first} is, got a tensor on {tensor.device}"
                    )
            return fake(*args)

        torch.library.register_fake(f"entrgi::{name}", checked)
        return fake

    return register


def _vector(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((like.shape[0],), dtype=dtype)


def _accumulator_rows(logits: Tensor) -> Tensor:
    """acc [N, V] whose rows start at 16-byte boundaries."""
    dtype = accumulator_dtype(logits)
    step = 16 // dtype.itemsize
    stride = (logits.shape[1] + step - 1) // step * step
    return logits.new_empty_strided(logits.shape, (stride, 1), dtype=dtype)


@_fake("logit_statistics")
def _(logits, temperature):
    acc = accumulator_dtype(logits)
    return (*(_vector(logits, acc) for _ in range(3)), _vector(logits, torch.int64))


@_fake("logit_statistics_backward")
def _(grad_logsumexp, grad_entropy, grad_tempered_entropy, logits, *_values):
    return logits.new_empty(logits.shape)


@_fake("sample_tokens")
def _(logits, keys, temperature, top_p, top_k, forbidden, error_flag):
    acc = accumulator_dtype(logits)
    return tuple(_vector(logits, t) for t in (acc, acc, acc, torch.int64, torch.int64, acc, acc, acc))


@_fake("gumbel_perturb")
def _(logits, keys, scale):
    return _accumulator_rows(logits)


@_fake("relaxed_embedding")
def _(logits, logsumexp, embedding, hard_tokens, weight, temperature):
    shape = (logits.shape[0], embedding.shape[1])
    return embedding.new_empty(shape), embedding.new_empty(shape, dtype=accumulator_dtype(logits))


@_fake("logit_gradient")
def _(grad, logits, logsumexp, embedding, soft, rows, temperature):
    return _accumulator_rows(logits)


for _name in ("relaxed_embedding_", "adam_step_", "sgd_step_", "commit_"):
    _fake(_name)(lambda *args: None)


# ---- autograd: in the logits only --------------------------------------------------------------------------


def _save_statistics(ctx, inputs, output):
    logits, ctx.temperature = inputs
    ctx.save_for_backward(logits, *output[:3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _statistics_backward(ctx, grad_logsumexp, grad_entropy, grad_tempered_entropy, grad_argmax):
    grads = (grad_logsumexp, grad_entropy, grad_tempered_entropy)
    if all(grad is None for grad in grads):
        return None, None
    logits, logsumexp, entropy, tempered_entropy = ctx.saved_tensors
    unit_logsumexp = logsumexp
    if grad_entropy is not None and ctx.temperature != 1.0:
        unit_logsumexp = _ops.logit_statistics(logits, 1.0)[0]
    gradient = _ops.logit_statistics_backward(
        *grads, logits, logsumexp, unit_logsumexp, entropy, tempered_entropy, ctx.temperature
    )
    return gradient, None


def _save_embedding(ctx, inputs, output):
    logits, logsumexp, embedding, _, _, ctx.temperature = inputs
    ctx.save_for_backward(logits, logsumexp, embedding, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _embedding_backward(ctx, grad_output, grad_soft):
    if grad_output is None:
        return (None,) * 6
    logits, logsumexp, embedding, soft = ctx.saved_tensors
    # logsumexp is a function of the logits: its part is in softmax's own gradient, not in an argument's.
    gradient = _ops.logit_gradient(grad_output.contiguous(), logits, logsumexp, embedding, soft, None, ctx.temperature)
    return gradient.to(logits.dtype), None, None, None, None, None


def _no_double_backward(name: str):
    def backward(ctx, grad):
        raise RuntimeError(f"entrgi::{name} has no derivative: double backward is not supported")

    return backward


torch.library.register_autograd("entrgi::logit_statistics", _statistics_backward, setup_context=_save_statistics)
torch.library.register_autograd("entrgi::relaxed_embedding", _embedding_backward, setup_context=_save_embedding)
for _name in ("logit_statistics_backward", "logit_gradient"):
    torch.library.register_autograd(f"entrgi::{_name}", _no_double_backward(_name))
