"""Dream and its relatives: Qwen2 run bidirectionally, each position predicting the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]: found at run time, in all versions
)

from entrgi.denoisers.causal import BidirectionalLM
from entrgi.models.checkpoints import load_tokenizer
from entrgi.models.fields import check_fields, check_heads, is_tied, read_json
from entrgi.models.rope import read_rope

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


class DreamDenoiser(BidirectionalLM):
    """Dream-v0-{Instruct,Base}-7B, DiffuCoder, Dream-Coder: ``model_type`` "Dream" (arXiv 2508.15487).

    The Qwen2 architecture, bidirectional. It predicts the next position: the logits of position l come from
    the hidden state of l - 1, and position 0 keeps its own. The mask id is config.json's.
    """

    shift = True
    model_type = "Dream"
    architecture = "DreamModel"
    fields_read = (*_REQUIRED, "num_key_value_heads", "hidden_act")

    @staticmethod
    def build_model(fields: Mapping[str, Any]) -> Qwen2ForCausalLM:
        """See :meth:`BidirectionalLM.build_model`."""
        check_fields(fields, _REQUIRED)
        kv_heads = fields.get("num_key_value_heads") or fields["num_attention_heads"]
        check_heads(fields, fields["hidden_size"], fields["num_attention_heads"], kv_heads)
        config = Qwen2Config(
            **{name: fields[name] for name in _REQUIRED},
            **read_rope("denoiser", fields).options(),
            num_key_value_heads=kv_heads,
            hidden_act=fields.get("hidden_act") or "silu",
            tie_word_embeddings=is_tied(fields, absent=False),
        )
        return Qwen2ForCausalLM(config)

    @staticmethod
    def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
        # DreamTokenizer is code of the repository: Qwen2's byte-level BPE under another name.
        path = folder / "tokenizer_config.json"
        named = read_json("denoiser", path).get("tokenizer_class") if path.is_file() else None
        return load_tokenizer("denoiser", folder, Qwen2TokenizerFast if named == "DreamTokenizer" else AutoTokenizer)
