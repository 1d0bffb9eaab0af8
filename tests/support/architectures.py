"""Tiny random models of many architectures, windows of attention included."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

WINDOW = 4  # so short that every sequence is longer

# Causal models, all of which can keep a prefix: every position sees itself and all before it,
CAUSAL = ["arcee", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "helium", "hunyuan_v1_dense"]
CAUSAL += ["llama", "nemotron", "olmo", "olmo2", "opt", "persimmon", "phi", "seed_oss", "stablelm"]
# a window of the last ones,
CAUSAL += ["ministral3", "mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"]
# or the one or the other, layer by layer.
CAUSAL += ["exaone4", "gemma2", "gemma3_text", "ministral", "modernbert-decoder", "olmo3", "qwen2", "qwen3", "smollm3"]
BIDIRECTIONAL = ["albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "megatron-bert"]
BIDIRECTIONAL += ["modernbert", "mpnet", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta"]
BIDIRECTIONAL += ["xlm-roberta-xl"]

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "max_position_embeddings": 40,
}
_ROPE = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
_SLIDING = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "initializer_range": 0.2}
_PLAIN = {"num_key_value_heads": 4, "initializer_range": 0.2}
_BERT = {"initializer_range": 0.3}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}

OPTIONS = {
    **dict.fromkeys(["gpt2", "gpt_bigcode"], _GPT2),
    **dict.fromkeys(["gpt_neox", "opt", "persimmon", "phi", "stablelm"], _PLAIN),
    **dict.fromkeys(["mistral", "ministral3", "mixtral", "phi3", "qwen3_moe", "starcoder2"], _ROPE | _SLIDING),
    **dict.fromkeys(
        ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3", "exaone4"], _ROPE | _SLIDING | _KINDS
    ),
    "ministral": _ROPE | _KINDS,
    "roberta": _BERT | {"pad_token_id": 1, "max_position_embeddings": 42},
    "albert": _BERT | {"embedding_size": 32},
    "electra": _BERT | {"embedding_size": 32},
    "distilbert": _BERT | _DISTILBERT,
    **dict.fromkeys(
        ["modernbert", "modernbert-decoder"],
        _BERT | {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
}
OPTIONS["opt"] = OPTIONS["opt"] | {"ffn_dim": 48, "word_embed_proj_dim": 32}
OPTIONS["mixtral"] = OPTIONS["mixtral"] | {"num_local_experts": 2}
OPTIONS["qwen3_moe"] = OPTIONS["qwen3_moe"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPTIONS["gemma2"] = OPTIONS["gemma2"] | {"query_pre_attn_scalar": 8}
# Grouped matrix products of mixture models know no float64.
SINGLE_PRECISION = {"mixtral", "qwen3_moe"}
# Nothing in them is computed in float32 when the weights are float64.
DOUBLE_PRECISION = {"gpt2", "gpt_bigcode", "opt", "bert", "distilbert", "roberta"}


def config(kind, **options):
    bidirectional = "bert" in kind or kind in ("electra", "ernie", "mpnet", "roformer", "data2vec-text")
    return CONFIG_MAPPING[kind](**(_COMMON | OPTIONS.get(kind, _BERT if bidirectional else _ROPE) | options))


def _build(auto, kind, seed, options):
    torch.manual_seed(seed)
    model = auto.from_config(config(kind, **options)).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name.lower():
                parameter.uniform_(-0.3, 0.3)  # biases are born zero
    return model if kind in SINGLE_PRECISION else model.double()


def classifier(kind, seed=0, **options):
    """In evaluation mode and float64 where it can be."""
    return _build(AutoModelForSequenceClassification, kind, seed, options)


def causal_lm(kind, seed=0, **options):
    """In evaluation mode and float64 where it can be."""
    return _build(AutoModelForCausalLM, kind, seed, options)
