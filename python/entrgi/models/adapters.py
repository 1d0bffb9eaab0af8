"""Adapters of peft, merged into the weights of the model they were trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrgi.models.errors import loading, reason_of
from entrgi.models.fields import read_json
from entrgi.models.files import is_hub_id, pickles_beside

_PREFIX = "base_model.model."  # of peft, before the model's own names
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# They are no change of weights, or name other checkpoints and tokenizers to load.
_NOT_MERGED = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
_NOT_MERGED += ("CARTRIDGE", "POLY", "XLORA", "MIXED")
_SECONDS = 10  # for all expressions of an adapter on all names of a model; sensible ones take milliseconds
_MOST = {"r": 2**14, "rank": 2**14, "init_r": 2**14, "target_r": 2**14}
_MOST_LAYERS = 2**11
# peft's own ways of matching a module's name; run apart, since a match in progress cannot be stopped.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


def apply_adapter(
    model: PreTrainedModel,
    adapter: str | Path | Sequence[str | Path],
    argument: str = "adapter",
    **hub_options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """``model`` with LoRA adapters merged into its weights, and the names of the weights they brought whole.

    An adapter may bring its own embedding and output layer, with more rows than the model's (tokens were added).

    Args:
        model: the base model that the adapter was trained on; changed in place.
        adapter: a folder with adapter_config.json and safetensors as ``peft`` writes them, or a hub id; several are
            merged in turn, each into the result of those before it.
        argument: what to call the model in an error.
        hub_options: ``cache_dir``, ``token``, ``local_files_only`` for a hub id.

    Raises:
        ValueError: where peft is not installed, the adapter cannot be had or does not fit the model: weights of
            another shape, or for layers that the model does not have; and for pickles, modules to import, and
            sizes or expressions that would keep the machine busy.
    """
    brought: set[str] = set()
    for one in adapters_of(argument, adapter):
        model, names = _apply_one(model, one, argument, hub_options)
        brought |= names
    return model, brought


def adapters_of(argument: str, adapter: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One or several adapters as a list. Raises ValueError where there is none, or something else."""
    adapters = [adapter] if isinstance(adapter, str | Path) else adapter
    if not isinstance(adapters, list | tuple) or not adapters:
        raise ValueError(f"{argument}: adapter is {adapter!r:.200}, expected a folder or hub id, or a list of them")
    for one in adapters:
        if not isinstance(one, str | Path):
            raise ValueError(f"{argument}: adapter has {one!r:.200}, expected folders or hub ids")
    return list(adapters)


def _apply_one(
    model: PreTrainedModel, adapter: str | Path, argument: str, hub_options: Mapping[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{argument}: adapter={str(adapter)!r} needs peft: pip install peft") from error
    folder = _adapter_folder(argument, adapter, hub_options)
    fields = read_json(argument, folder / _CONFIG)
    names = [name for name, _ in model.named_modules()]
    _check_fields(argument, adapter, fields, names)
    _check_weights(argument, adapter, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            config = peft.PeftConfig.from_pretrained(str(folder))
            if fields.get("task_type") == "CAUSAL_LM":
                config.task_type = None  # all it would add is generation, which a classifier under it has not
            weights = _without_twins(load_file(folder / _WEIGHTS))
            layers = _vocabulary_layers(model)
            _resize_vocabulary(model, layers, weights)
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), config=config)
            # Nothing is to be asked of the base model that the adapter names.
            for config in wrapped.peft_config.values():
                config.base_model_name_or_path = None
            fitted = peft.get_peft_model_state_dict(wrapped).keys()
            # An embedding beside the adapter's own weights is among those only where peft finds that it was resized.
            fitted |= weights.keys() & _whole(wrapped, layers)
    except Exception as error:
        raise ValueError(f"{argument}: cannot apply adapter {str(adapter)!r}: {reason_of(error)}") from error
    # peft passes over weights that find no place, and leaves places without a weight as they were initialised.
    for kind, lost in {
        "does not have": weights.keys() - fitted,
        "expects": fitted - weights.keys(),
    }.items():
        if lost:
            raise ValueError(
                f"{argument}: adapter {str(adapter)!r} does not fit {type(model).__name__}: {len(lost)} weights "
                f"that one {kind} and the other not, such as {min(lost)!r}"
            )
    _untie(wrapped)
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ValueError(f"{argument}: cannot merge adapter {str(adapter)!r}: {reason_of(error)}") from error
    return merged, {name.removeprefix(_PREFIX) for name in weights if "lora_" not in name}


def _check_weights(argument: str, adapter: str | Path, folder: Path) -> None:
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(
            f"{argument}: cannot apply adapter {str(adapter)!r}: it has no {_WEIGHTS}{pickles_beside(folder)}"
        )


def _without_twins(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` without what peft writes twice: an embedding that is saved as a module and as an embedding."""
    return {
        name: weight
        for name, weight in weights.items()
        if ".modules_to_save." not in name or name.replace(".modules_to_save.", ".") not in weights
    }


def _resize_vocabulary(
    model: Any, layers: Mapping[str, nn.Embedding | nn.Linear], weights: Mapping[str, Tensor]
) -> None:
    """Make room for an embedding or output layer of another number of rows that an adapter brings whole."""
    for key, tensor in weights.items():
        name = key.removeprefix(_PREFIX).removesuffix(".weight")
        name = name.removesuffix(".base_layer").removesuffix(".original_module")
        layer = layers.get(name) if key.startswith(_PREFIX) and key.endswith(".weight") else None
        if layer is None or tensor.dim() != 2 or tensor.shape[1] != layer.weight.shape[1]:
            continue
        old, rows = layer.weight, tensor.shape[0]
        if rows == old.shape[0]:
            continue
        kept = old.detach()[:rows]
        new = tensor[len(kept) :].to(kept)  # a layer that is tied to it and not brought has these, too
        weight = nn.Parameter(torch.cat([kept, new]), requires_grad=old.requires_grad)
        for tied in layers.values():  # the other one may be the same parameter
            if tied.weight is old:
                tied.weight = weight
                _set_rows(tied, rows)
                if isinstance(tied, nn.Embedding):
                    model.config.get_text_config().vocab_size = rows


def _untie(wrapped: Any) -> None:
    """A weight of its own for every layer that shares the one of a layer with an adapter: that one alone changes."""
    adapted = {name for name, _ in wrapped.named_modules() if name.endswith(".base_layer")}
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, nn.Embedding | nn.Linear)}
    changing = {layers[name].weight for name in adapted & layers.keys()}
    taken = set()
    for layer in layers.values():
        if layer.weight in taken:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            wrapped.config.tie_word_embeddings = False
        elif layer.weight in changing:
            taken.add(layer.weight)


def _set_rows(layer: nn.Embedding | nn.Linear, rows: int) -> None:
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings = rows
        return
    layer.out_features = rows
    if layer.bias is not None:
        bias = layer.bias.new_zeros(rows)
        kept = min(rows, len(layer.bias))
        bias[:kept] = layer.bias.detach()[:kept]
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)


def _vocabulary_layers(model: Any) -> dict[str, nn.Embedding | nn.Linear]:
    """Embeddings and linear layers with one row for each token, by name."""
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and module.weight.dim() == 2 and module.weight.shape[0] == rows
    }


def _whole(wrapped: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """The names under which an adapter may hold ``layers`` whole, beside what it adds to them."""
    held = wrapped.state_dict().keys()
    return {
        f"{_PREFIX}{name}.{part}"
        for name in layers
        for part in ("weight", "bias", "base_layer.weight", "original_module.weight", "original_module.bias")
        if f"{_PREFIX}{name}.{part}" in held
    }


def adapter_task(argument: str, adapter: str | Path, **hub_options: Any) -> str | None:
    """What an adapter was trained for, such as ``SEQ_CLS``. Raises ValueError where it has no config."""
    return read_json(argument, _adapter_folder(argument, adapter, hub_options) / _CONFIG).get("task_type")


def _adapter_folder(argument: str, adapter: str | Path, hub_options: Mapping[str, Any]) -> Path:
    path = Path(adapter)
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise ValueError(f"{argument}: adapter folder {str(adapter)!r} has no adapter_config.json")
        return path
    if not is_hub_id(adapter):
        raise ValueError(f"{argument}: no adapter folder {str(adapter)!r}")
    place = {name: value for name, value in hub_options.items() if name != "revision"}  # the model's
    with loading(argument, adapter):
        path = Path(snapshot_download(str(adapter), allow_patterns=[_CONFIG, _WEIGHTS], **place))
        if not (path / _CONFIG).is_file():
            raise ValueError(f"{argument}: adapter {str(adapter)!r} has no adapter_config.json")
        return path


def _check_fields(argument: str, adapter: str | Path, fields: Mapping[str, Any], names: list[str]) -> None:
    """Raise ValueError where adapter_config.json asks for more than a change of weights."""

    def refuse(name: str, expected: str) -> None:
        raise ValueError(
            f"{argument}: adapter_config.json of {str(adapter)!r} has {name} {fields[name]!r:.200}, expected {expected}"
        )

    if fields.get("peft_type") in _NOT_MERGED:
        refuse("peft_type", "LORA, or another kind that changes weights")
    # auto_mapping names a library to import, too, which is done only by classes that are not used here.
    for name in ("megatron_config", "tokenizer_name_or_path"):
        if fields.get(name) is not None:
            refuse(name, "null: nothing is imported or fetched for an adapter")
    for name, most in _MOST.items():
        sizes = fields.get(name)
        if sizes is not None and not (isinstance(sizes, int) and not isinstance(sizes, bool) and 0 < sizes <= most):
            refuse(name, f"an integer in [1, {most}]")
    ranks = fields.get("rank_pattern")
    if isinstance(ranks, dict) and any(isinstance(rank, int) and not 0 < rank <= _MOST["r"] for rank in ranks.values()):
        refuse("rank_pattern", f"integers in [1, {_MOST['r']}]")
    copies = fields.get("layer_replication")
    if copies is not None:
        listed = copies if isinstance(copies, list) else [copies]
        pairs = [pair for pair in listed if isinstance(pair, list) and len(pair) == 2]
        whole = [pair for pair in pairs if all(isinstance(end, int) for end in pair)]
        if len(whole) != len(listed) or sum(end - start for start, end in whole) > _MOST_LAYERS:
            refuse("layer_replication", f"pairs of layers, at most {_MOST_LAYERS} in all")
    layers = fields.get("layers_pattern")
    if not isinstance(layers, str | list | None) or not all(isinstance(layer, str) for layer in layers or []):
        refuse("layers_pattern", "a name or several")
    _check_expressions(argument, adapter, sorted(set(_expressions(fields))), names)


def _expressions(fields: Mapping[str, Any]) -> Iterator[str]:
    """Every text that peft matches names of modules with as a regular expression, as it does it."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules", "target_parameters"):
        if isinstance(fields.get(name), str):
            yield rf"(?:{fields[name]})\Z"
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(fields.get(name), dict):
            yield from (rf"(.*\.)?({key})$" for key in fields[name])
    layers = fields.get("layers_pattern")
    for layer in [layers] if isinstance(layers, str) else layers or []:
        yield rf"(?:^|.*?\.){layer}\.(?P<idx>\d+)\."
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        for module in fields[name] if isinstance(fields.get(name), list) else []:
            if not isinstance(module, str) or not re.fullmatch(r"[\w.\-]*", module):
                yield rf"(^|.*\.){module}($|\..*)"


def _check_expressions(argument: str, adapter: str | Path, patterns: list[str], names: list[str]) -> None:
    """Raise ValueError where an expression is none, or does not get done with the model's names."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{argument}: adapter_config.json of {str(adapter)!r} has the regular expression {pattern!r:.200}, "
                f"which cannot be read: {error}"
            ) from error
    if all(re.fullmatch(r"[\w.\-]*", pattern) for pattern in patterns):
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            text=True,
            timeout=_SECONDS,
            check=True,
            capture_output=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise ValueError(
            f"{argument}: adapter_config.json of {str(adapter)!r} has regular expressions, such as "
            f"{patterns[0]!r:.200}, that are not done within {_SECONDS} seconds on the model's {len(names)} modules"
        ) from error
