"""The packed weight files of the demo pair, and their way back to dense fp32 tensors.

A weight ``name`` of shape [rows, columns] is stored in one of these forms:

    name             fp16, as it is
    name.int8        int8 [rows, columns], times name.scale fp16 [rows, 1]
    name.int4        uint8 [rows, columns / 2], two values a byte, low half first, biased by 8;
                     times name.scale fp16 [rows, columns / 64]: one for each 64 columns

The reward's file stores only what differs from the denoiser's encoder: a weight may come as a
low-rank change ``name.up @ name.down``, each factor again in one of the forms above.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

GROUP = 64
_INT4_BIAS = 8
_ENCODER = "distilbert."


class DemoFilesError(RuntimeError):
    """A file of the demo pair is missing or is not the one that was published."""


def verify(folder: Path, only: str | None = None) -> None:
    """Compare the files below ``folder`` with ``manifest.json`` (sha256 and size in bytes).

    Args:
        folder: the folder that holds ``manifest.json``.
        only: check just this file of the manifest.

    Raises:
        DemoFilesError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoFilesError(f"demo pair: manifest.json is missing or unreadable: {error}") from error
    for name, expected in manifest.items():
        if only is not None and name != only:
            continue
        path = folder / name
        if not path.is_file():
            raise DemoFilesError(f"demo pair: {name} is missing; reinstall the package")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DemoFilesError(
                f"demo pair: {name} has {size} bytes, expected {expected['bytes']}; reinstall the package"
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected["sha256"]:
            raise DemoFilesError(f"demo pair: {name} is damaged (sha256 differs); reinstall the package")


def read_denoiser(folder: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 state of the denoiser, the tied output projection included."""
    state = _dense(_load(folder / "denoiser" / "model.safetensors"))
    state["vocab_projector.weight"] = state["distilbert.embeddings.word_embeddings.weight"]
    return state


def read_reward(folder: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 state of the reward: the denoiser's encoder with the reward's changes."""
    encoder = {name: tensor for name, tensor in read_denoiser(folder).items() if name.startswith(_ENCODER)}
    changes = _dense(_load(folder / "reward" / "model.safetensors"))
    for name in [name for name in changes if name.endswith(".up")]:
        weight = name.removesuffix(".up")
        encoder[weight] = encoder[weight] + changes.pop(name) @ changes.pop(f"{weight}.down")
    return encoder | changes


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DemoFilesError(f"demo pair: cannot read {path.name}: {error}") from error


def _dense(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dense = {}
    for name, tensor in stored.items():
        stem, _, form = name.rpartition(".")
        if form == "scale":
            continue
        if form == "int8":
            dense[stem] = tensor.float() * stored[f"{stem}.scale"].float()
        elif form == "int4":
            halves = torch.stack((tensor & 15, tensor >> 4), -1).flatten(1)
            groups = (halves.float() - _INT4_BIAS).unflatten(1, (-1, GROUP))
            dense[stem] = (groups * stored[f"{stem}.scale"].float()[..., None]).flatten(1)
        else:
            dense[name] = tensor.float()
    return dense
