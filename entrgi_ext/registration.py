"""Loads the operator libraries and tells torch what C++ cannot: fakes and autograd.

Importing this module loads ``libentrgi_cpu.so`` (schemas and CPU kernels; an :class:`ImportError` where it is
missing) and, under a torch that has CUDA, ``libentrgi_cuda.so`` (where that fails the reason is kept for
:func:`loaded_libraries`, and the CPU operators work without it).
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import fakes

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
fakes.register()


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
