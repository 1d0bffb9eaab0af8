"""LLaDA: Llama run bidirectionally, under its own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from entrgi.denoisers.causal import BidirectionalLM
from entrgi.models.fields import check_fields, check_heads, either, is_tied
from entrgi.models.rope import read_rope

# As the official code calls them, and as transformers does.
_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_sequence_length": "max_position_embeddings",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
}
_REQUIRED = ("d_model", "n_heads", "n_layers", "max_sequence_length", "vocab_size", "rms_norm_eps")
# What the official code takes an absent field for, and what is supported here.
_SUPPORTED = {
    "block_type": ("sequential", "llama"),
    "block_group_size": (1, 1),
    "activation_type": ("swiglu", "silu"),
    "rope": (False, True),
    "alibi": (False, False),
    "layer_norm_type": ("default", "rms"),
    "layer_norm_with_affine": (True, True),
    "attention_layer_norm": (False, False),
    "input_emb_norm": (False, False),
    "scale_logits": (False, False),
}
_OPTIONAL = ("mlp_ratio", "multi_query_attention", "embedding_size", "include_bias", "include_qkv_bias")
_OPTIONAL += ("bias_for_layer_norm", "rope_full_precision", "attention_layer_norm_with_affine")
# Of training, and of how the official code is run.
_OPTIONAL += ("alibi_bias_max", "embedding_dropout", "residual_dropout", "flash_attention", "init_device", "precision")
_OPTIONAL += ("init_std", "init_fn", "init_cutoff_factor")
_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


class LLaDADenoiser(BidirectionalLM):
    """LLaDA-8B-{Instruct,Base}, LLaDA-1.5: ``model_type`` "llada" (arXiv 2502.09992).

    The Llama architecture, bidirectional, with the checkpoint's own names of fields and weights. Each position
    predicts itself. The mask id is config.json's (126336). With ``rope_full_precision``, queries and keys are
    rotated in float32 whatever the model's dtype, as in the official code.
    """

    shift = False
    model_type = "llada"
    architecture = "LLaDAModelLM"
    fields_read = (*_NAMES, *_NAMES.values(), *_REQUIRED, *_SUPPORTED, *_OPTIONAL)

    @staticmethod
    def build_model(fields: Mapping[str, Any]) -> LlamaForCausalLM:
        """See :meth:`BidirectionalLM.build_model`."""
        fields = {**fields, **{name: either(fields, name, other) for name, other in _NAMES.items()}}
        check_fields(fields, _REQUIRED, _SUPPORTED)
        width, heads = fields["d_model"], fields["n_heads"]
        if width % heads:
            raise ValueError(f"denoiser: config.json has d_model {width}, expected a multiple of n_heads {heads}")
        check_heads(fields, width, heads, _kv_heads(fields))
        rows = fields.get("embedding_size") or fields["vocab_size"]
        if rows < fields["vocab_size"]:
            raise ValueError(
                f"denoiser: config.json has embedding_size {rows}, expected at least vocab_size {fields['vocab_size']}"
            )
        bias = fields.get("include_bias", False)
        norm_bias = fields.get("bias_for_layer_norm")
        if bias if norm_bias is None else norm_bias:
            raise ValueError(
                f"denoiser: config.json has bias_for_layer_norm {norm_bias!r} and include_bias {bias!r}, "
                "expected bias_for_layer_norm False: nothing else is supported"
            )
        attention_bias = bias or bool(fields.get("include_qkv_bias"))
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=fields["mlp_hidden_size"] or fields.get("mlp_ratio", 4) * width,
            num_hidden_layers=fields["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=_kv_heads(fields),
            max_position_embeddings=fields["max_sequence_length"],
            rms_norm_eps=fields["rms_norm_eps"],
            # The official code scales no angles.
            **read_rope("denoiser", fields, supported=("default",)).options(),
            tie_word_embeddings=is_tied(fields, absent=True),
            attention_bias=attention_bias,
            mlp_bias=bias,
        )
        model = LlamaForCausalLM(config)
        if attention_bias and not bias:  # Llama's flag covers all four projections, include_qkv_bias only three
            layers: Any = model.model.layers
            for layer in layers:
                layer.self_attn.o_proj.bias = None
        if bias and not config.tie_word_embeddings:
            model.lm_head = nn.Linear(width, config.vocab_size, bias=True)
        if fields.get("rope_full_precision", True):
            model.model.rotary_emb = FullPrecisionRotary(config=config)
        return model

    @staticmethod
    def _modules(model: PreTrainedModel) -> dict[str, str]:
        names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
        for layer in range(model.config.num_hidden_layers):
            names |= {f"blocks.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in _BLOCK.items()}
        return {f"model.transformer.{theirs}": ours for theirs, ours in names.items()}


class FullPrecisionRotary(LlamaRotaryEmbedding):
    """Llama's cosines and sines, not rounded to a dtype below float32, so that rotations are not either."""

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, both [1, S, D] in float32 or ``hidden``'s wider dtype; ``position_ids`` is [1, S]."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return super().forward(hidden.new_empty(0, dtype=wide), position_ids)


def _kv_heads(fields: Mapping[str, Any]) -> int:
    """Heads of keys and values: ``n_kv_heads``, else one with ``multi_query_attention``, else ``n_heads``."""
    given, multi_query = fields.get("n_kv_heads"), fields.get("multi_query_attention")
    if multi_query is None:
        return given or fields["n_heads"]
    expected = 1 if multi_query else fields["n_heads"]
    if given not in (None, expected):
        raise ValueError(
            f"denoiser: config.json has n_kv_heads {given!r} and multi_query_attention {multi_query!r}, "
            f"expected n_kv_heads {expected}"
        )
    return expected
