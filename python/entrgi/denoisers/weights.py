"""Checkpoint folders and their safetensors, read tensor by tensor into a model that holds no memory yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # configuration and tokenizer; never code
_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def checkpoint_folder(name: str | Path, **hub_options: object) -> Path:
    """The folder of a checkpoint: ``name`` itself, or the local copy of a hub id, fetched where it is missing.

    Args:
        name: a folder, or a hub id.
        hub_options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, as for ``snapshot_download``.

    Raises:
        ValueError: for a hub id that cannot be had, or an option that is none of these.
    """
    unknown = hub_options.keys() - set(_HUB_OPTIONS)
    if unknown:
        raise ValueError(f"denoiser: unknown option {min(unknown)!r}, expected one of {', '.join(_HUB_OPTIONS)}")
    if Path(name).is_dir():
        return Path(name)
    folder = _fetch(str(name), _SMALL_FILES, hub_options)
    return _fetch(str(name), _weight_names(folder), hub_options)


def read_json(file: Path) -> dict[str, object]:
    """The fields of a JSON file. Raises ValueError where it holds no JSON object."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"denoiser: cannot read {str(file)!r}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"denoiser: {str(file)!r} holds a {type(fields).__name__}, expected an object")
    return fields


def load_weights(
    model: PreTrainedModel,
    folder: Path,
    modules: Mapping[str, str],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> None:
    """Fill ``model``, whose parameters are on the meta device, from a folder's safetensors.

    Tensors are read one at a time, straight to ``device``, so memory holds the model and one tensor. Names,
    shapes and kinds are compared before anything is read. Buffers of rotary frequencies, which old exports
    store, are ignored: they follow from the config.

    Args:
        model: a ``*ForCausalLM`` on the meta device; where its config ties the embeddings, the output layer
            becomes the input embedding.
        modules: the model's name of each module that the checkpoint calls otherwise.
        dtype: of the weights; None takes that of the stored input embedding.
        device: None is the CPU.

    Raises:
        ValueError: for weights that are missing, unexpected, of another shape or not floating point, and for
            files that are missing or cannot be read.
    """
    tied = model.config.tie_word_embeddings
    expected = dict(model.named_parameters(remove_duplicate=False))
    stored = _stored_tensors(folder, modules)
    copy_of_head = None
    if tied:
        expected.pop(_HEAD, None)
        copy_of_head = stored.pop(_HEAD, None)
    _compare(folder, stored, expected, modules)
    dtype, device = dtype or _FLOATS[stored[_EMBEDDING].kind], str(device or "cpu")
    for file in sorted({tensor.file for tensor in stored.values()}):
        with _opened(file, device) as reader:
            for name, tensor in stored.items():
                if tensor.file == file:
                    _assign(model, name, reader.get_tensor(tensor.key).to(dtype))
    if copy_of_head is not None:
        with _opened(copy_of_head.file, device) as reader:
            if not torch.equal(reader.get_tensor(copy_of_head.key).to(dtype), model.get_parameter(_EMBEDDING)):
                raise ValueError(
                    f"denoiser: config.json of {str(folder)!r} ties the output layer to the input embedding, "
                    f"yet {copy_of_head.key!r} differs from it"
                )
    if tied:
        model.lm_head.weight = model.get_parameter(_EMBEDDING)


@dataclass(frozen=True)
class _Stored:
    """One tensor of a checkpoint: where it is, its shape and its safetensors dtype, such as ``BF16``."""

    file: Path
    key: str
    shape: list[int]
    kind: str


def _weight_names(folder: Path) -> list[str]:
    """The safetensors files that a checkpoint should have: its index's shards, or the single file."""
    index = folder / _INDEX
    if not index.is_file():
        return [_SINGLE]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"denoiser: {str(index)!r} has no 'weight_map', expected the file of each weight")
    return sorted(set(shards.values()))


def _fetch(name: str, files: list[str], hub_options: Mapping[str, object]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=files, **hub_options))
    except (OSError, ValueError) as error:
        raise ValueError(f"denoiser: cannot load {name!r}: {error}") from error


def _opened(file: Path, device: str) -> safe_open:
    try:
        return safe_open(file, framework="pt", device=device)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"denoiser: cannot read {str(file)!r}: {error}") from error


def _stored_tensors(folder: Path, modules: Mapping[str, str]) -> dict[str, _Stored]:
    """Every tensor of a checkpoint under the model's name for it, from the files' headers alone."""
    stored: dict[str, _Stored] = {}
    for name in _weight_names(folder):
        if not (folder / name).is_file():
            raise ValueError(
                f"denoiser: {str(folder)!r} has no {name}, expected {_SINGLE}, or {_INDEX} and the files it names"
            )
        with _opened(folder / name, "cpu") as reader:
            for key in reader.keys():  # noqa: SIM118 (not a mapping)
                path, _, leaf = key.rpartition(".")
                if not key.endswith("rotary_emb.inv_freq"):
                    part = reader.get_slice(key)
                    stored[f"{modules.get(path, path)}.{leaf}"] = _Stored(
                        folder / name, key, part.get_shape(), part.get_dtype()
                    )
    return stored


def _compare(
    folder: Path, stored: Mapping[str, _Stored], expected: Mapping[str, Tensor], modules: Mapping[str, str]
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
