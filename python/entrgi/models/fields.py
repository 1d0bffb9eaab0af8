"""The fields of a config.json: read, and refused where they ask for code, for absurd sizes or for what is unknown."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from entrgi.models.placement import choose_dtype

_LARGEST_FILE = 2**27  # bytes of JSON; the index of a model with a million tensors has less

# Names of attention and experts that every transformers has; any other is a package or code from a hub.
_OWN_IMPLEMENTATIONS = ("eager", "sdpa")
_IMPLEMENTATION = re.compile("_?(attn|experts)_implementation(_internal)?")

# The most that a model can sensibly have, to be refused before anything is built from it.
_LAYERS, _EXPERTS, _LABELS, _WIDTH, _VOCABULARY, _POSITIONS = 2**11, 2**16, 2**20, 2**20, 2**24, 2**31
_LAYERS_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_SHARED_LAYERS = 64  # ALBERT's are one
_MOST = {
    **dict.fromkeys(_LAYERS_FIELDS, _LAYERS),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers", "num_hidden_groups", "inner_group_num"], _LAYERS),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"], _EXPERTS),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "n_kv_heads"], _EXPERTS),
    "num_labels": _LABELS,
    **dict.fromkeys(["hidden_size", "intermediate_size", "head_dim", "d_model", "n_embd", "n_inner", "dim"], _WIDTH),
    **dict.fromkeys(["hidden_dim", "ffn_dim", "d_ff", "d_inner", "mlp_hidden_size", "moe_intermediate_size"], _WIDTH),
    **dict.fromkeys(["vocab_size", "embedding_size", "type_vocab_size"], _VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "max_sequence_length", "n_positions"], _POSITIONS),
}
_MAY_BE_NEGATIVE = ("max_position_embeddings", "dim")  # XLNet's -1: without an end
_MAY_BE_ZERO = (
    "head_dim",
    "type_vocab_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
)


def read_json(argument: str, file: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: where it cannot be read, holds no JSON object, NaN, or one name with two values.
    """

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any] | float:
        if len(entries) == 1 and entries[0][0] == "__float__":  # transformers 5 writes infinity like that
            return constant(str(entries[0][1]))
        fields: dict[str, Any] = {}
        for name, value in entries:
            if name in fields and fields[name] != value:
                raise ValueError(f"{name!r} stands there twice, as {fields[name]!r} and as {value!r}")
            fields[name] = value
        return fields

    def constant(name: str) -> float:
        if name not in ("Infinity", "-Infinity"):
            raise ValueError(f"{name} is no number")
        return float(name)

    try:
        if not file.is_file():
            raise OSError("expected a file")
        if file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{file.stat().st_size} bytes, expected at most {_LARGEST_FILE}")
        text = file.read_text(encoding="utf-8-sig")
        fields = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError(f"{argument}: cannot read {str(file)!r}: nested too deep") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: cannot read {str(file)!r}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{argument}: {str(file)!r} holds a {type(fields).__name__}, expected an object")
    return fields


def read_fields(argument: str, folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json, which ask neither for code nor for a model beyond all sizes.

    Attention and experts that transformers does not bring itself are left out: they are the user's to choose.

    Raises:
        ValueError: for a file that cannot be read, implementations of attention or experts that are a repository
            of kernels, weights outside the folder, and sizes that are not numbers or absurd.
    """
    file = folder / "config.json"
    fields = read_json(argument, file)
    for name in ("transformers_weights", "configuration_files"):
        if fields.get(name):
            raise ValueError(
                f"{argument}: {str(file)!r} has {name} {fields[name]!r}, expected none: the model is read from "
                "config.json and model.safetensors, or the files of its index"
            )
    for name, kind, expected in (("model_type", str, "a name"), ("architectures", list, "a list of names")):
        value = fields.get(name)
        if not isinstance(value, kind | None) or (kind is list and not all(isinstance(x, str) for x in value or [])):
            raise ValueError(f"{argument}: {str(file)!r} has {name} {fields[name]!r:.80}, expected {expected}")
        if not fields.get(name):
            fields.pop(name, None)
    try:
        for place, part in objects(fields):
            _check_object(argument, file, place, part)
    except RecursionError as error:
        raise ValueError(f"{argument}: cannot read {str(file)!r}: nested too deep") from error
    return fields


def objects(value: object, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """``value`` and every object inside it, with the path to each."""
    if isinstance(value, dict):
        yield place, value
        for name, inner in list(value.items()):
            yield from objects(inner, f"{place}{name}.")
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner, place)


def _check_object(argument: str, file: Path, place: str, part: dict[str, Any]) -> None:
    for name, value in list(part.items()):
        if _IMPLEMENTATION.fullmatch(name):
            for chosen in _strings(value):
                if re.search(r"[/:\\@]", chosen):
                    raise ValueError(
                        f"{argument}: {str(file)!r} has {place}{name} {chosen!r}, expected one of "
                        f"{', '.join(_OWN_IMPLEMENTATIONS)}: code from a repository is never run"
                    )
            if "attn" not in name or "internal" in name or value not in _OWN_IMPLEMENTATIONS:
                del part[name]
        elif name in ("fusion_config", "kernel_config", "distributed_config"):
            del part[name]
        elif name in _MOST and value is not None:
            _check_size(argument, file, place + name, name, value)
    is_config = not place or (place.endswith("_config.") and not place.startswith(("quantization", "compression")))
    if is_config and ("torch_dtype" in part or "dtype" in part):
        dtype = stored_dtype(argument, part)
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
        if dtype is not None:
            part["dtype"] = str(dtype).removeprefix("torch.")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def is_number(value: object, kind: type = Real) -> bool:
    """Whether ``value`` is a number of ``kind``; truth values are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_size(argument: str, file: Path, place: str, name: str, value: object) -> None:
    several = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    sizes: Any = several or [None]
    for size in sizes:
        whole = is_number(size, Integral) or (isinstance(size, float) and size.is_integer())
        least = -1 if name in _MAY_BE_NEGATIVE else 0 if name in _MAY_BE_ZERO else 1
        if isinstance(size, bool) or not whole or not least <= size <= _MOST[name]:
            raise ValueError(
                f"{argument}: {str(file)!r} has {place} {value!r:.80}, expected an integer in [{least}, {_MOST[name]}]"
            )


def check_layers(argument: str, name: str | Path, fields: Mapping[str, Any], tensors: int) -> None:
    """Raise ValueError where a config.json has more layers than so many ``tensors`` can fill, shared ones aside."""
    for field in _LAYERS_FIELDS:
        layers = fields.get(field)
        if isinstance(layers, int) and layers > tensors + _SHARED_LAYERS:
            raise ValueError(
                f"{argument}: config.json of {str(name)!r} describes {layers} layers ({field}), its files hold "
                f"{tensors} tensors"
            )


def stored_dtype(argument: str, fields: Mapping[str, Any]) -> torch.dtype | None:
    """What ``dtype`` or ``torch_dtype`` say; None where they say nothing, or "auto"."""
    dtypes = {
        name: choose_dtype(argument, fields[name], f"{name} of config.json")
        for name in ("dtype", "torch_dtype")
        if fields.get(name) is not None
    }
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{argument}: config.json has dtype {fields['dtype']!r} and torch_dtype {fields['torch_dtype']!r}, "
            "expected the same in both"
        )
    return next(iter(dtypes.values()), None)


def either(fields: Mapping[str, Any], *names: str) -> Any:
    """The value of a field that has several names; None where none is given, ValueError where they disagree."""
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    first = next(iter(given), "")
    for name, value in given.items():
        if value != given[first]:
            raise ValueError(
                f"denoiser: config.json has {first} {given[first]!r} and {name} {value!r}, expected the same in both"
            )
    return given.get(first)


def is_tied(fields: Mapping[str, Any], absent: bool) -> bool:
    """Whether the output layer is the input embedding: ``tie_word_embeddings`` or ``weight_tying``."""
    tied = either(fields, "tie_word_embeddings", "weight_tying")
    if tied is not None and not isinstance(tied, bool):
        name = "tie_word_embeddings" if fields.get("tie_word_embeddings") is not None else "weight_tying"
        raise ValueError(f"denoiser: config.json has {name} {tied!r}, expected true or false")
    return absent if tied is None else tied


def architectures_of(fields: Mapping[str, Any]) -> list[str]:
    """The classes that ``architectures`` names; none where it names none."""
    names = fields.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def model_type_of(fields: Mapping[str, Any]) -> str | None:
    """``model_type``, or where that is missing, the one that transformers has for one of ``architectures``."""
    given = fields.get("model_type")
    if isinstance(given, str) and given:
        return given
    tables = ("", "_FOR_CAUSAL_LM", "_FOR_MASKED_LM", "_FOR_SEQUENCE_CLASSIFICATION")
    for architecture in architectures_of(fields):
        for table in tables:
            for model_type, classes in getattr(modeling_auto, f"MODEL{table}_MAPPING_NAMES").items():
                if architecture in (classes if isinstance(classes, tuple | list) else (classes,)):
                    return model_type
    return None


def check_fields(
    fields: Mapping[str, Any],
    required: tuple[str, ...],
    supported: Mapping[str, tuple[object, object]] = MappingProxyType({}),
) -> None:
    """Raise ValueError unless a config.json has what is required and asks for nothing that is not supported.

    That includes fields of other models that change what is computed, whatever ``supported`` says.

    Args:
        fields: of the config.json.
        required: fields that must be there.
        supported: for a field, what an absent one means, and the one value that is supported.
    """
    for name in required:
        value = fields.get(name)
        if value is None:
            raise ValueError(f"denoiser: config.json has no {name!r}")
        kind, expected = (Real, "a number") if name.endswith("eps") else (Integral, "an integer")
        if not is_number(value, kind) or not 0 < value < float("inf"):
            raise ValueError(f"denoiser: config.json has {name} {value!r:.80}, expected {expected} > 0")
    for name, (absent, expected) in supported.items():
        value = fields.get(name, absent)
        if value != expected or (value is None) != (expected is None):
            raise ValueError(
                f"denoiser: config.json has {name} {value!r:.200}, expected {expected!r}: nothing else is supported"
            )
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value not in (None, [], {}) and name not in supported and value not in neutral:
            raise ValueError(
                f"denoiser: config.json has {name} {value!r:.200}, expected "
                f"{' or '.join(map(repr, neutral)) or 'null'}: nothing else is supported"
            )


def check_heads(fields: Mapping[str, Any], width: int, heads: int, kv_heads: object) -> None:
    """Raise ValueError unless ``width`` splits into ``heads`` of an even size that share whole groups of keys."""
    if width % heads or width // heads % 2:
        raise ValueError(f"denoiser: config.json has width {width} and {heads} heads, expected heads of an even size")
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, Integral) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"denoiser: config.json has {kv_heads!r} heads of keys, expected a divisor of its {heads} heads"
        )
    if fields.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"denoiser: config.json has head_dim {fields['head_dim']!r}, expected {width // heads}: nothing else is "
            "supported"
        )
    layers = fields.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise ValueError(
            f"denoiser: config.json has layer_types {layers!r:.200}, expected 'full_attention' alone: nothing else is "
            "supported"
        )


# Fields of other models that change what is computed, and the values with which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_percent"], (1.0,)),
    **dict.fromkeys(["rotary_dim", "rotary_emb_base", "rope_base", "rope_local_base_freq", "no_rope_layers"], ()),
    **dict.fromkeys(["rope_interleaved", "rope_interleave", "use_mrope", "alibi", "is_causal", "causal"], (False,)),
    **dict.fromkeys(["is_decoder", "is_encoder_decoder", "add_cross_attention", "use_sliding_window"], (False,)),
    "use_bidirectional_attention": (True, "all"),
    **dict.fromkeys(["final_logit_softcapping", "attn_logit_softcapping", "clip_qkv"], ()),
    **dict.fromkeys(["logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"], (1.0,)),
    **dict.fromkeys(["scale_emb", "scale_depth", "embedding_scale", "embedding_scale_factor"], (1.0,)),
    **dict.fromkeys(["scale_embedding", "normalize_embeddings", "scale_attn_by_inverse_layer_idx"], (False,)),
    **dict.fromkeys(["attention_multiplier", "query_pre_attn_scalar", "attention_chunk_size"], ()),
    **dict.fromkeys(["use_qk_norm", "qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn"], (False,)),
    **dict.fromkeys(["bd_size", "block_size", "diffusion_block_size", "sub_block_size"], ()),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], (0,)),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "num_experts_per_tok"], (0,)),
    **dict.fromkeys(["moe_intermediate_size", "expert_intermediate_size", "moe_layer_freq"], ()),
    **dict.fromkeys(["num_nextn_predict_layers"], (0,)),
    **dict.fromkeys(["text_config", "vision_config", "audio_config", "mm_vision_tower", "pruned_heads"], ({},)),
    **dict.fromkeys(["quantization_config", "compression_config"], ()),
    **dict.fromkeys(["self_conditioning", "time_conditioning", "use_time_embedding"], (False,)),
}

# Of any model, and without a part in what it computes.
_INERT = {
    *PretrainedConfig().to_dict(),
    *("torch_dtype", "dtype", "auto_map", "architectures", "model_type", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "sep_token_id", "cls_token_id", "unk_token_id"),
    *("use_cache", "initializer_range", "attention_dropout", "attention_bias", "hidden_dropout", "dropout", "mlp_bias"),
    *("head_dim", "layer_types", "sliding_window", "max_window_layers", "original_max_position_embeddings"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "pretraining_tp"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "weight_tying", "full_attn_mod"),
    *(
        "name_or_path",
        "_commit_hash",
        "unsloth_version",
        "unsloth_fixed",
        "output_router_logits",
        "task_specific_params",
    ),
    *("max_length", "min_length", "temperature", "top_k", "top_p", "do_sample", "num_beams", "repetition_penalty"),
}


def warn_of_unread(name: str | Path, fields: Mapping[str, Any], read: tuple[str, ...]) -> None:
    """Warn of fields that say something and are neither ``read`` nor known to change nothing."""
    unread = [
        field
        for field, value in fields.items()
        if field not in _INERT
        and field not in read
        and field not in _NEUTRAL
        and value not in (None, False, "", [], {})
    ]
    if unread:
        warnings.warn(
            f"denoiser: config.json of {str(name)!r} has fields that are not read: {', '.join(sorted(unread))}; "
            "if the model computes otherwise with them, load it yourself and pass it to CallableDenoiser",
            stacklevel=2,
        )
