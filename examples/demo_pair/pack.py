"""Write the student pair as the package data of ``entrgi.demo``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from quantize import pack_int4, pack_int8
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.utils import parametrize
from transformers import DistilBertForMaskedLM, DistilBertForSequenceClassification

_CONFIG_KEYS = (
    "activation",
    "attention_dropout",
    "dim",
    "dropout",
    "hidden_dim",
    "initializer_range",
    "max_position_embeddings",
    "model_type",
    "n_heads",
    "n_layers",
    "pad_token_id",
    "qa_dropout",
    "seq_classif_dropout",
    "sinusoidal_pos_embds",
    "tie_weights_",
    "vocab_size",
)
FILES = (
    "tokenizer.json",
    "denoiser/config.json",
    "denoiser/model.safetensors",
    "reward/config.json",
    "reward/model.safetensors",
)


def pack_denoiser(model: DistilBertForMaskedLM, folder: Path) -> None:
    """Store the layers and the words in 4 bits, the other matrices in 8, the vectors in fp16.

    Unlike the layers, the word embeddings lose next to nothing, untrained for it: 0.01 nats.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "vocab_projector.weight":  # tied to the word embeddings
            continue
        _store(stored, name, tensor, bits=4 if _in_four_bits(name) else 8)
    _save(stored, model.config.to_dict(), "DistilBertForMaskedLM", folder)


def pack_reward(model: DistilBertForSequenceClassification, folder: Path) -> None:
    """Store the reward's low-rank changes, vectors and head, but not the denoiser's matrices."""
    stored: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            change = module.parametrizations.weight[0]
            stored[f"{name}.weight.up"] = change.up.detach().half()
            stored[f"{name}.weight.down"] = change.down.detach().half()
            stored[f"{name}.bias"] = module.bias.detach().half()
    for name, tensor in model.state_dict().items():
        if "parametrizations" in name or name in stored or "_embeddings.weight" in name:
            continue
        _store(stored, name, tensor, bits=8)
    _save(stored, model.config.to_dict(), "DistilBertForSequenceClassification", folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the shared ``tokenizer.json``."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def write_manifest(folder: Path) -> int:
    """Write ``manifest.json`` over ``FILES`` and return their bytes in all."""
    manifest = {}
    for name in FILES:
        data = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return sum(entry["bytes"] for entry in manifest.values())


def _in_four_bits(name: str) -> bool:
    return ".transformer." in name or "word_embeddings" in name


def _store(stored: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, bits: int) -> None:
    if tensor.ndim < 2 or tensor.shape[0] == 1:
        stored[name] = tensor.detach().half().contiguous()
        return
    for suffix, part in (pack_int4 if bits == 4 else pack_int8)(tensor).items():
        stored[name + suffix] = part.contiguous()


def _save(stored: dict[str, torch.Tensor], config: dict, architecture: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    kept = {key: config[key] for key in _CONFIG_KEYS if key in config}
    kept["architectures"] = [architecture]
    if architecture.endswith("SequenceClassification"):
        # One label: transformers then treats the output as a regression.
        kept |= {"id2label": {"0": "valence"}, "label2id": {"valence": 0}}
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
