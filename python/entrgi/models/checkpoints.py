"""Model files from a local folder or a hub id, complete or refused; code from a repository is never run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from entrgi.held import HeldSetting
from entrgi.models.adapters import apply_adapter
from entrgi.models.errors import REMOTE_CODE, loading, refuse_unknown
from entrgi.models.fields import check_layers, is_number, model_type_of, objects, read_fields
from entrgi.models.files import HUB_OPTIONS, Weights, check_checkpoint, checkpoint_folder, read_tensors, stored_weights
from entrgi.models.generation import keep_end_ids
from entrgi.models.placement import choose_device, choose_dtype
from entrgi.models.rope import settle_rope

# What ``from_pretrained`` of transformers takes, beside fields of the config.
_OPTIONS = (
    *HUB_OPTIONS,
    *("subfolder", "variant", "attn_implementation", "experts_implementation", "device_map", "max_memory"),
    *("offload_folder", "offload_buffers", "quantization_config", "ignore_mismatched_sizes", "low_cpu_mem_usage"),
    *("key_mapping", "use_safetensors", "tp_plan", "distributed_config", "trust_remote_code", "torch_dtype"),
)
# Numbers that a config may describe beyond those that are stored: heads that an adapter brings.
_UNSTORED = 10**7


def load_pretrained(
    argument: str,
    name: str | Path,
    auto_class: type,
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    known: Iterable[str] = (),
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``name``, the model frozen, in evaluation mode and on ``device``.

    Args:
        argument: what to call it in an error, ``denoiser`` or ``reward``.
        name: a folder with config.json, safetensors and tokenizer files, or a hub id.
        auto_class: such as ``AutoModelForMaskedLM``.
        dtype: of the weights; None keeps the checkpoint's.
        device: None is the CPU, or wherever ``device_map`` or a quantised checkpoint puts the model.
        adapter: folder or hub id of a LoRA adapter, or several, see :func:`entrgi.models.adapters.apply_adapter`.
            Weights that it brings whole (a classifier's head) may be missing in the checkpoint.
        known: options of the caller, to be named where one is misspelled.
        options: passed to ``from_pretrained``; ``revision``, ``cache_dir``, ``token`` and ``local_files_only`` hold
            for the tokenizer, too.

    Raises:
        ValueError: for a folder that does not exist or lacks files, a hub id that cannot be had, code that only the
            repository has, a checkpoint that lacks weights of ``auto_class`` (they would be random) or has them in
            another shape, an adapter that does not fit, an option that is not known, or ``trust_remote_code``.
    """
    options = _allowed(argument, options)
    older = options.pop("torch_dtype", None)
    dtype = choose_dtype(argument, older if dtype is None else dtype)
    place = choose_device(f"{argument}: device", device)
    if place is not None and options.get("device_map") is not None:
        raise ValueError(f"{argument}: got device {device!r} and device_map, expected one of them")
    folder, fields = find_checkpoint(argument, name, options)
    # Parameters made under inference mode cannot take part in a gradient later.
    with torch.inference_mode(False), loading(argument, name):
        if adapter is None and (folder / "adapter_config.json").is_file():
            adapter = folder  # a model with its adapter beside it
        config, rest = _config(argument, name, fields, options, known)
        tokenizer = load_tokenizer(argument, folder, name=name, config=config)
        try:
            weights = stored_weights(argument, folder, options.get("variant"))
        except ValueError as error:
            reason = str(error).removeprefix(f"{argument}: ")
            raise ValueError(f"{argument}: cannot load {str(name)!r}: {reason}") from error
        check_layers(argument, name, fields, len(weights.tensors))
        model, report = _model(argument, name, auto_class, folder, config, weights, dtype, rest)
        _check_shapes(argument, name, model, report)
        keep_end_ids(argument, model, folder, fields, tokenizer)
        missing = set(report["missing_keys"])
        if adapter is not None:
            model, brought = apply_adapter(model, adapter, argument, **hub(options))
            missing -= brought
        if missing:
            raise ValueError(
                f"{argument}: {str(name)!r} lacks {len(missing)} weights of {type(model).__name__}, "
                f"such as {min(missing)!r}"
            )
    if options.get("device_map") is not None:
        return freeze(model), tokenizer
    return _placed(argument, freeze(model), place), tokenizer


def find_checkpoint(
    argument: str, name: str | Path, options: Any, *, with_weights: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The local folder of a checkpoint and the fields of its config.json, fetched from the hub where need be.

    Args:
        options: where it lies: the hub's, ``subfolder`` and ``variant`` are read, the others passed over;
            ``trust_remote_code`` is taken out.
        with_weights: fetch them, too.

    Raises:
        ValueError: for a checkpoint that cannot be had, a config.json that cannot be read, or ``trust_remote_code``.
    """
    refuse_remote_code(argument, options)
    subfolder = options.get("subfolder") or ""
    check_checkpoint(argument, name, subfolder)
    with loading(argument, name):
        folder = checkpoint_folder(
            argument, name, options.get("variant"), subfolder, with_weights=with_weights, **hub(options)
        )
        return folder, read_fields(argument, folder)


def _allowed(argument: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without those that are always the same here; ValueError where they ask for what is refused."""
    options = dict(options)
    refuse_remote_code(argument, options)
    if options.pop("use_safetensors", None) is False:
        raise ValueError(f"{argument}: use_safetensors is False, expected True: pickles are never read")
    for name in ("attn_implementation", "experts_implementation"):
        if any(mark in str(options.get(name)) for mark in "/:@"):
            raise ValueError(
                f"{argument}: {name} is {options[name]!r}, expected one of transformers' own: "
                "code from a repository is never run"
            )
    return options


def _config(
    argument: str, name: str | Path, fields: dict[str, Any], options: Mapping[str, Any], known: Iterable[str]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a config.json's fields and of those ``options`` that are fields, and the other options."""
    model_type = model_type_of(fields)
    if model_type is None or model_type not in CONFIG_MAPPING:
        if fields.get("auto_map"):
            raise ValueError(f"{argument}: cannot load {str(name)!r}: {REMOTE_CODE}")
        raise ValueError(
            f"{argument}: config.json of {str(name)!r} has model_type {fields.get('model_type')!r}, expected one "
            "that transformers knows"
        )
    fields["model_type"] = model_type
    for _, part in objects(fields):
        settle_rope(argument, part)
    own = {option: value for option, value in options.items() if option not in _OPTIONS}
    kind: Any = CONFIG_MAPPING[model_type]
    config, unused = kind.from_dict(fields, return_unused_kwargs=True, **own)
    config.name_or_path = str(name)  # transformers knows some checkpoints by theirs
    known = [option for option in known if option not in ("name", "options")]
    refuse_unknown(argument, unused, (*known, *_OPTIONS), near=("num_labels", *config.to_dict()))
    done = (*HUB_OPTIONS, "subfolder", "ignore_mismatched_sizes", "trust_remote_code")
    return config, {option: options[option] for option in _OPTIONS if option in options and option not in done}


def _model(
    argument: str,
    name: str | Path,
    auto_class: type,
    folder: Path,
    config: PretrainedConfig,
    weights: Weights,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with what transformers reports of its weights. Nothing is allocated before sizes are compared."""
    with torch.device("meta"), without_report():
        skeleton = auto_class.from_config(deepcopy(config))
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    quantised = getattr(config, "quantization_config", None) is not None
    if not quantised and described > 2 * weights.numel + _UNSTORED:
        raise ValueError(
            f"{argument}: config.json of {str(name)!r} describes {described} weights of {type(skeleton).__name__}, "
            f"its files hold {weights.numel}"
        )
    # Shapes that differ are reported in full that way, and refused all the same.
    options = {"dtype": dtype or "auto", "ignore_mismatched_sizes": True, "output_loading_info": True, **options}
    with without_report():
        if weights.is_plain:
            return auto_class.from_pretrained(folder, config=config, use_safetensors=True, **options)
        tensors = dict(read_tensors(argument, weights.tensors))
        if dtype is None:
            options["dtype"] = getattr(config, "dtype", None) or _float_dtype(tensors)
        return type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=tensors, **options)


def _float_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


def _check_shapes(argument: str, name: str | Path, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise ValueError where weights have another shape than the model's: these would be random."""
    mismatched = sorted(report.get("mismatched_keys") or [])
    if mismatched:
        key, *shapes = mismatched[0] if isinstance(mismatched[0], tuple) else [mismatched[0]]
        differ = f" {list(shapes[0])}, expected {list(shapes[1])}" if len(shapes) == 2 else ""
        raise ValueError(
            f"{argument}: {str(name)!r} holds {len(mismatched)} weights of {type(model).__name__} in another shape, "
            f"such as {key!r}{differ}"
        )
    failed = report.get("error_msgs") or report.get("conversion_errors")
    if failed:
        raise ValueError(f"{argument}: cannot load {str(name)!r}: {' '.join(str(failed).split())[:400]}")


def _placed(argument: str, model: PreTrainedModel, device: torch.device | None) -> PreTrainedModel:
    """``model`` on ``device``, unless loading has put it where it belongs."""
    spread = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    if spread and device is None:
        return model
    try:
        return cast(Any, model).to(device or "cpu")
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{argument}: {type(model).__name__} cannot be moved to {device} once loaded, expected device_map= in "
            f"place of device=: {error}"
        ) from error


def refuse_remote_code(argument: str, options: Any) -> None:
    """Take ``trust_remote_code`` out of ``options``. Raises ValueError where it is true."""
    if options.pop("trust_remote_code", False):
        raise ValueError(
            f"{argument}: trust_remote_code is not supported, code from a repository is never run; "
            "load the model yourself and pass it to the class"
        )


def read_config(argument: str, name: str | Path, **options: Any) -> PretrainedConfig:
    """The checkpoint's config. Raises ValueError where there is none. Of ``options`` the hub's are used."""
    _, fields = find_checkpoint(argument, name, options, with_weights=False)
    with loading(argument, name):
        return _config(argument, name, fields, {}, ())[0]


def read_tokenizer(argument: str, name: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer alone. Raises ValueError where there is none."""
    check_checkpoint(argument, name)
    with loading(argument, name):
        return load_tokenizer(argument, checkpoint_folder(argument, name, with_weights=False), name=name)


def load_tokenizer(
    argument: str,
    folder: Path,
    tokenizer_class: type = AutoTokenizer,
    *,
    name: str | Path | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; ``name`` is what an error calls it.

    Raises:
        ValueError: where its files are missing or cannot be read, or declare a context that is none.
    """
    with loading(argument, name or folder):
        with without_report():  # it would say that class and model_type are not its own, which is known
            # trust_remote_code left out would ask on the terminal whether to run the repository's code.
            tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False, **options)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up by transformers
            raise ValueError(f"{argument}: {str(name or folder)!r} has no tokenizer files")
        longest = tokenizer.model_max_length
        if not is_number(longest) or not longest >= 1:
            raise ValueError(
                f"{argument}: tokenizer_config.json of {str(name or folder)!r} has model_max_length {longest!r:.80}, "
                "expected a number >= 1"
            )
        return tokenizer


def hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that say where on the hub, and as whom, a file is looked for."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


_level: Any = logging  # whose numbers are not among what it exports
_silence = HeldSetting(logging.get_verbosity, logging.set_verbosity, _level.ERROR)


def without_report() -> AbstractContextManager[None]:
    """Without transformers' table of missing and surplus weights: what is missing is raised, the rest is not read."""
    return _silence


def exact_attention(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with attention that computes what its config says.

    Gemma 2 caps its attention scores, which sdpa cannot do: older transformers left the cap out in silence.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in evaluation mode, its parameters without gradient."""
    return model.eval().requires_grad_(False)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest sequence, in tokens, that model and tokenizer declare; None where neither does."""
    limits = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions > 0:  # XLNet's -1: without an end
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from padding_idx + 1.
        counts_from = table.padding_idx if isinstance(table, nn.Embedding) else None
        limits.append(positions if counts_from is None else positions - counts_from - 1)
    if tokenizer.model_max_length < 10**9:  # tokenizers without a limit say 1e30
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)
