"""Model files from a local folder or a hub id, complete or refused; code from a repository is never run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
REMOTE_CODE = "it needs code from its repository, which is never run"


def load_pretrained(
    argument: str,
    name: str | Path,
    auto_class: type,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    *,
    adapter: str | Path | None = None,
    **options: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``name``, the model frozen, in evaluation mode and on ``device``.

    Args:
        argument: what to call it in an error, ``denoiser`` or ``reward``.
        name: a folder with config.json, safetensors and tokenizer files, or a hub id.
        auto_class: such as ``AutoModelForMaskedLM``.
        dtype: of the weights; None keeps the checkpoint's.
        adapter: folder or hub id of a LoRA adapter, see :func:`apply_adapter`. Weights that it brings whole (a
            classifier's head) may be missing in the checkpoint.
        options: passed to ``from_pretrained``; ``revision``, ``cache_dir``, ``token`` and ``local_files_only`` hold
            for the tokenizer, too.

    Raises:
        ValueError: for a folder that does not exist or lacks files, a hub id that cannot be had, code that only the
            repository has, a checkpoint that lacks weights of ``auto_class`` (they would be random), an adapter that
            does not fit, or ``trust_remote_code``.
    """
    check_checkpoint(argument, name)
    refuse_remote_code(argument, options)
    # trust_remote_code left out would ask on the terminal whether to run the repository's code.
    options = {"dtype": dtype or "auto", "trust_remote_code": False, **options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub_options(options))
        with without_report():
            model, report = auto_class.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_load(argument, name, error) from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up by transformers
        raise ValueError(f"{argument}: {str(name)!r} has no tokenizer files")
    missing = set(report["missing_keys"])
    if adapter is not None:
        model, brought = apply_adapter(model, adapter, argument)
        missing -= brought
    if missing:
        raise ValueError(
            f"{argument}: {str(name)!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"such as {min(missing)!r}"
        )
    return freeze(model).to(device or "cpu"), tokenizer


def check_checkpoint(argument: str, name: str | Path) -> None:
    """Raise ValueError where ``name`` is a path without a checkpoint, before anything asks a hub for it."""
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{argument}: {str(name)!r} is an adapter; expected its base model, and the adapter as adapter="
            )
        raise ValueError(f"{argument}: folder {str(name)!r} has no config.json")
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{argument}: no folder {str(name)!r}, expected a checkpoint folder or a hub id")


def refuse_remote_code(argument: str, options: dict[str, object]) -> None:
    """Take ``trust_remote_code`` out of ``options``. Raises ValueError where it is true."""
    if options.pop("trust_remote_code", False):
        raise ValueError(
            f"{argument}: trust_remote_code is not supported, code from a repository is never run; "
            "load the model yourself and pass it to the class"
        )


def read_config(argument: str, name: str | Path, **options: object) -> PretrainedConfig:
    """The checkpoint's config. Raises ValueError where there is none. Of ``options`` the hub's are used."""
    check_checkpoint(argument, name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **hub_options(options))
    except (OSError, ValueError) as error:
        raise cannot_load(argument, name, error) from error


def read_tokenizer(argument: str, name: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer alone. Raises ValueError where there is none."""
    check_checkpoint(argument, name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_load(argument, name, error) from error


def hub_options(options: dict[str, object]) -> dict[str, object]:
    """Those of ``options`` that say where on the hub, and as whom, a file is looked for."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def cannot_load(argument: str, name: str | Path, error: Exception) -> ValueError:
    """One sentence for what transformers and the hub say in several."""
    text = " ".join(str(error).split())
    reason = REMOTE_CODE if "trust_remote_code" in text else text.split(". ")[0].rstrip(".")
    place = "" if Path(name).exists() else ", no folder here"
    return ValueError(f"{argument}: cannot load {str(name)!r}{place}: {reason}")


@contextmanager
def without_report() -> Iterator[None]:
    """Without transformers' table of missing and surplus weights: what is missing is raised, the rest is not read."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def apply_adapter(
    model: PreTrainedModel, adapter: str | Path, argument: str = "adapter"
) -> tuple[PreTrainedModel, set[str]]:
    """``model`` with a LoRA adapter merged into its weights, and the names of the weights it brought whole.

    Args:
        model: the base model that the adapter was trained on; changed in place.
        adapter: a folder with adapter_config.json and weights as ``peft`` writes them, or a hub id.
        argument: what to call the model in an error.

    Raises:
        ValueError: where peft is not installed, the adapter cannot be had or does not fit the model: weights of
            another shape, or for layers that the model does not have.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{argument}: adapter={str(adapter)!r} needs peft: pip install peft") from error
    path = Path(adapter)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{argument}: adapter folder {str(adapter)!r} has no adapter_config.json")
    if not path.is_dir() and (path.is_absolute() or str(adapter).startswith((".", "~")) or str(adapter).count("/") > 1):
        raise ValueError(f"{argument}: no adapter folder {str(adapter)!r}")
    try:
        weights = peft.load_peft_weights(str(adapter), device="cpu")
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter))
        fitted = peft.get_peft_model_state_dict(wrapped)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{argument}: cannot apply adapter {str(adapter)!r}: {error}") from error
    # peft passes over weights that find no place, and leaves places without a weight as they were initialised.
    for kind, names in {
        "does not have": weights.keys() - fitted.keys(),
        "expects": fitted.keys() - weights.keys(),
    }.items():
        if names:
            raise ValueError(
                f"{argument}: adapter {str(adapter)!r} does not fit {type(model).__name__}: {len(names)} weights "
                f"that one {kind} and the other not, such as {min(names)!r}"
            )
    merged = wrapped.merge_and_unload(safe_merge=True)
    return merged, {name.removeprefix("base_model.model.") for name in weights if "lora_" not in name}


def adapter_task(argument: str, adapter: str | Path) -> str | None:
    """What an adapter was trained for, such as ``SEQ_CLS``. Raises ValueError where it has no config."""
    try:
        path = cached_file(str(adapter), "adapter_config.json")
        return json.loads(Path(path).read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: cannot read the adapter {str(adapter)!r}: {error}") from error


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
    if positions:
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from padding_idx + 1.
        counts_from = table.padding_idx if isinstance(table, nn.Embedding) else None
        limits.append(positions if counts_from is None else positions - counts_from - 1)
    if tokenizer.model_max_length < 10**9:  # tokenizers without a limit say 1e30
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)
