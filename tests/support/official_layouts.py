"""Tiny random checkpoints of Dream and LLaDA in their official layouts, and what they compute, in plain torch."""

import json
import math

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
MERGES = ["t h", "th e", "Ġ the", "m o", "v i"]
PIECES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
EOS, IM_START, IM_END, BOS, MASK = range(len(PIECES), len(PIECES) + len(SPECIAL))
VOCAB = len(PIECES) + len(SPECIAL) + 4  # output layers are padded
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 40,
    "max_window_layers": 2,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": EOS,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "rope_theta": 50.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": EOS,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 40,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": EOS,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-3,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 50.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}


def dream_weights(fields, seed=0):
    """Random float32 weights of a Dream checkpoint under their official names."""
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    kv = width // fields["num_attention_heads"] * fields["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [fields["vocab_size"], width], "model.norm.weight": [width]}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [fields["vocab_size"], width]
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.input_layernorm.weight": [width], f"{block}.post_attention_layernorm.weight": [width]}
        for name, rows in {"q": width, "k": kv, "v": kv}.items():
            shapes |= {
                f"{block}.self_attn.{name}_proj.weight": [rows, width],
                f"{block}.self_attn.{name}_proj.bias": [rows],
            }
        shapes[f"{block}.self_attn.o_proj.weight"] = [width, width]
        shapes |= {f"{block}.mlp.gate_proj.weight": [inner, width], f"{block}.mlp.up_proj.weight": [inner, width]}
        shapes[f"{block}.mlp.down_proj.weight"] = [width, inner]
    return _random(shapes, seed)


def llada_weights(fields, seed=0):
    """Random float32 weights of a LLaDA checkpoint under their official names."""
    width, inner = fields["d_model"], fields["mlp_hidden_size"] or fields["mlp_ratio"] * fields["d_model"]
    kv = width // fields["n_heads"] * _llada_kv_heads(fields)
    rows = fields["embedding_size"] or fields["vocab_size"]
    bias, qkv_bias = fields["include_bias"], fields["include_bias"] or fields["include_qkv_bias"]
    shapes = {"model.transformer.wte.weight": [rows, width], "model.transformer.ln_f.weight": [width]}

    def linear(name, out, into, with_bias):
        shapes[f"model.transformer.{name}.weight"] = [out, into]
        if with_bias:
            shapes[f"model.transformer.{name}.bias"] = [out]

    if not fields["weight_tying"]:
        linear("ff_out", rows, width, bias)
    for layer in range(fields["n_layers"]):
        block = f"blocks.{layer}"
        shapes |= {f"model.transformer.{block}.{norm}.weight": [width] for norm in ("attn_norm", "ff_norm")}
        linear(f"{block}.q_proj", width, width, qkv_bias)
        linear(f"{block}.k_proj", kv, width, qkv_bias)
        linear(f"{block}.v_proj", kv, width, qkv_bias)
        linear(f"{block}.attn_out", width, width, bias)
        linear(f"{block}.ff_proj", inner, width, bias)
        linear(f"{block}.up_proj", inner, width, bias)
        linear(f"{block}.ff_out", width, inner, bias)
    return _random(shapes, seed)


def _llada_kv_heads(fields):
    if fields["n_kv_heads"] is not None:
        return fields["n_kv_heads"]
    return 1 if fields["multi_query_attention"] else fields["n_heads"]


def _random(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        scale = 1.0 if len(shape) == 1 or "embed" in name or "wte" in name else 1.5 / math.sqrt(shape[-1])
        weights[name] = torch.randn(shape, generator=generator) * scale
    return weights


def write_checkpoint(folder, fields, weights, *, shards=2, dtype=torch.float32):
    """config.json, sharded safetensors with their index (or one file), and the tokenizer, in the official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(weights)
    if shards == 1:
        save_file({name: weights[name].to(dtype) for name in names}, folder / "model.safetensors")
    else:
        places = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: weights[name].to(dtype) for name in names[shard::shards]}
            save_file(part, folder / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if fields["model_type"] == "Dream":
        _write_dream_tokenizer(folder)
    else:
        _write_llada_tokenizer(folder)
    return folder


def _special_tokens():
    common = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(len(PIECES) + i): {"content": token, **common} for i, token in enumerate(SPECIAL)}


def _write_dream_tokenizer(folder):
    """Slow-tokenizer files, whose class is code of the repository."""
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PIECES)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "added_tokens.json").write_text(json.dumps({t: len(PIECES) + i for i, t in enumerate(SPECIAL)}))
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": _special_tokens(),
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    named = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "pad_token": "<|endoftext|>"}))


def _write_llada_tokenizer(folder):
    """A tokenizer.json, without a mask token, and with a [CLS] that is not the start of a text."""
    added = [{"id": int(i), **token} for i, token in _special_tokens().items()]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "post_processor": None,
                "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "vocab": {piece: i for i, piece in enumerate(PIECES)},
                    "merges": MERGES,
                },
            }
        )
    )
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": _special_tokens(),
        "bos_token": "<|beginoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "cls_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def dream_logits(weights, fields, tokens):
    """Logits [S, V] in float64 of one unpadded sequence [S]: what modeling_dream computes, then shifted right."""

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].double().T + (0 if bias is None else bias.double())

    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    eps, theta = fields["rms_norm_eps"], fields["rope_theta"]
    x = weights["model.embed_tokens.weight"].double()[tokens]
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        h = _rms_norm(x, weights[f"{block}.input_layernorm.weight"], eps)
        q, k, v = (linear(h, f"{block}.self_attn.{name}_proj") for name in "qkv")
        x = x + linear(_attention(q, k, v, heads, kv_heads, theta), f"{block}.self_attn.o_proj")
        h = _rms_norm(x, weights[f"{block}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, f"{block}.mlp.gate_proj"), linear(h, f"{block}.mlp.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{block}.mlp.down_proj")
    x = _rms_norm(x, weights["model.norm.weight"], eps)
    logits = linear(x, "model.embed_tokens" if fields["tie_word_embeddings"] else "lm_head")
    return torch.cat([logits[:1], logits[:-1]])


def llada_logits(weights, fields, tokens):
    """Logits [S, V] in float64 of one unpadded sequence [S]: what modeling_llada computes."""

    def linear(x, name):
        bias = weights.get(f"model.transformer.{name}.bias")
        return x @ weights[f"model.transformer.{name}.weight"].double().T + (0 if bias is None else bias.double())

    heads, kv_heads = fields["n_heads"], _llada_kv_heads(fields)
    eps, theta = fields["rms_norm_eps"], fields["rope_theta"]
    x = weights["model.transformer.wte.weight"].double()[tokens]
    for layer in range(fields["n_layers"]):
        block = f"blocks.{layer}"
        h = _rms_norm(x, weights[f"model.transformer.{block}.attn_norm.weight"], eps)
        q, k, v = (linear(h, f"{block}.{name}_proj") for name in "qkv")
        x = x + linear(_attention(q, k, v, heads, kv_heads, theta), f"{block}.attn_out")
        h = _rms_norm(x, weights[f"model.transformer.{block}.ff_norm.weight"], eps)
        gate = linear(h, f"{block}.ff_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, f"{block}.up_proj"), f"{block}.ff_out")
    x = _rms_norm(x, weights["model.transformer.ln_f.weight"], eps)
    return linear(x, "wte" if fields["weight_tying"] else "ff_out")


def _rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _attention(q, k, v, heads, kv_heads, theta):
    """Every position to every position; head h reads key/value head h // (heads / kv_heads)."""
    length, size = q.shape[0], q.shape[1] // heads
    half = size // 2
    angles = torch.arange(length).double()[:, None] / theta ** (torch.arange(half).double() * 2 / size)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x):  # pairs are (i, i + half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        query = rotated(q[:, head * size : (head + 1) * size])
        key = rotated(k[:, shared * size : (shared + 1) * size])
        scores = query @ key.T / math.sqrt(size)
        outputs.append(scores.softmax(-1) @ v[:, shared * size : (shared + 1) * size])
    return torch.cat(outputs, dim=-1)
