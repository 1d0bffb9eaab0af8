"""The safetensors of a checkpoint, read tensor by tensor into a model that holds no memory yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrgi.models.files import Stored, Weights, read_tensors

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(
    model: PreTrainedModel,
    folder: Path,
    weights: Weights,
    modules: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> None:
    """Fill ``model``, whose parameters are on the meta device, from a folder's safetensors.

    Tensors are read one at a time, straight to ``device``, so memory holds the model and one tensor. Names,
    shapes and kinds are compared before anything is read.

    Args:
        model: a ``*ForCausalLM`` on the meta device; where its config ties the embeddings, the output layer
            becomes the input embedding.
        weights: the folder's, see :func:`entrgi.models.files.stored_weights`.
        modules: the model's name of each module that the checkpoint calls otherwise.
        dtype: of the weights; None takes that of the stored input embedding.
        device: None is the CPU.

    Raises:
        ValueError: for weights that are missing, unexpected, of another shape or not floating point, and for
            files that cannot be read.
    """
    tied = model.config.tie_word_embeddings
    expected = dict(model.named_parameters(remove_duplicate=False))
    stored = {_ours(name, modules): tensor for name, tensor in weights.tensors.items()}
    copy_of_head = None
    if tied:
        expected.pop(_HEAD, None)
        copy_of_head = stored.pop(_HEAD, None)
    _compare(folder, stored, expected, modules)
    dtype, place = dtype or _FLOATS[stored[_EMBEDDING].kind], str(device or torch.device("cpu"))
    for name, tensor in read_tensors("denoiser", stored, place):
        _assign(model, name, tensor.to(dtype))
    if copy_of_head is not None:
        _, tensor = next(read_tensors("denoiser", {_HEAD: copy_of_head}, place))
        if not torch.equal(tensor.to(dtype), model.get_parameter(_EMBEDDING)):
            raise ValueError(
                f"denoiser: config.json of {str(folder)!r} ties the output layer to the input embedding, "
                f"yet {copy_of_head.key!r} differs from it"
            )
    if tied:
        model.lm_head.weight = model.get_parameter(_EMBEDDING)


def _ours(name: str, modules: Mapping[str, str]) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{modules.get(path, path)}.{leaf}"


def _compare(
    folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, Tensor], modules: Mapping[str, str]
) -> None:
    """Raise ValueError unless the checkpoint holds just the expected weights, in shape and kind."""
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        path, _, leaf = missing[0].rpartition(".")
        path = next((theirs for theirs, ours in modules.items() if ours == path), path)
        raise ValueError(f"denoiser: {str(folder)!r} lacks {len(missing)} weights, such as '{path}.{leaf}'")
    unexpected = sorted(stored[name].key for name in stored.keys() - expected.keys())
    if unexpected:
        raise ValueError(
            f"denoiser: {str(folder)!r} holds {len(unexpected)} weights that its config.json does not describe, "
            f"such as {unexpected[0]!r}"
        )
    for name, tensor in stored.items():
        if tensor.shape != list(expected[name].shape):
            raise ValueError(
                f"denoiser: {tensor.key!r} of {str(folder)!r} has shape {tensor.shape}, "
                f"expected {list(expected[name].shape)}"
            )
        if tensor.kind not in _FLOATS:
            raise ValueError(
                f"denoiser: {tensor.key!r} of {str(folder)!r} is {tensor.kind}, expected one of {', '.join(_FLOATS)}: "
                "quantised checkpoints are not supported"
            )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter ``name`` of ``model``, in place of one on the meta device."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
