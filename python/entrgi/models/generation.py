"""The tokens that end a text, as the files of a checkpoint name them: one or several, in two places."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from entrgi.models.fields import is_number, read_json

_FILE = "generation_config.json"


def keep_end_ids(
    argument: str,
    model: PreTrainedModel,
    folder: Path,
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Have ``model`` carry the end ids of its config.json and generation_config.json.

    An ordinary word in config.json is none: some classes write a default of their own there.

    Args:
        argument: what an error calls the model.
        fields: of config.json.
        tokenizer: of the checkpoint.

    Raises:
        ValueError: for ids that are none.
    """
    file = folder / _FILE
    generation = read_json(argument, file) if file.is_file() else {}
    own = _listed(f"{argument}: config.json", fields.get("eos_token_id"))
    ids = [token_id for token_id in own if token_id in tokenizer.added_tokens_decoder]
    ids += _listed(f"{argument}: {_FILE}", generation.get("eos_token_id"))
    model.generation_config = GenerationConfig(eos_token_id=list(dict.fromkeys(ids)) or None)


def declared_end_ids(model: object) -> list[int]:
    """The end ids that a model's config and generation config name."""
    if not isinstance(model, PreTrainedModel):
        return []
    # A class's own default says nothing about the checkpoint: Llama's is 2, whatever the vocabulary.
    own, kind = getattr(model.config, "eos_token_id", None), type(model.config)
    try:
        default = getattr(kind(), "eos_token_id", None)
    except Exception:  # a class whose arguments have no defaults
        default = None
    values = [None if own == default else own]
    generation = getattr(model, "generation_config", None)
    if generation is not None and not getattr(generation, "_from_model_config", False):
        values.append(generation.eos_token_id)
    return [token_id for value in values for token_id in _listed("denoiser: the model's config", value)]


def _listed(label: str, value: object) -> list[int]:
    values: Any = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(is_number(each, Integral) for each in values):
        raise ValueError(f"{label} has eos_token_id {value!r:.200}, expected an id or several")
    return [int(each) for each in values]
