"""Pairs of a Dream-type denoiser and a Skywork-type reward with random weights, built where they run: no download.

Shapes are those of the published checkpoints' config.json (Dream-v0-Instruct-7B: Qwen2 read in both directions, logits
shifted; Skywork-Reward-V2-Qwen3-1.7B: Qwen3 with one label) or small. Random weights do the same work as trained ones
but for the number of ids in the nucleus; ``lm_head`` is scaled so that logits have a standard deviation of 3, which
leaves some thousand, as many as an undecided model has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
ROLES = ["system", "user", "assistant"]
LOGIT_SPREAD = 3.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer; ``rows`` is the height of its embedding and of ``lm_head``."""

    rows: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


DREAM_7B = Shape(152_064, 3584, 28, 28, 4, 128, 18_944)
SKYWORK_1_7B = Shape(151_936, 2048, 28, 16, 8, 128, 6144)
WORDS = 151_667  # tokens of Dream's tokenizer
# Hidden sizes small and vocabulary whole: the work that grows with the vocabulary dominates.
SMALL_DREAM = Shape(152_064, 256, 2, 4, 2, 64, 768)
SMALL_SKYWORK = Shape(151_936, 512, 2, 8, 4, 64, 1024)
TINY_DREAM, TINY_SKYWORK = Shape(200, 32, 2, 4, 2, 8, 64), Shape(192, 32, 2, 4, 2, 8, 64)
TINY_WORDS = 180


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    """``words`` tokens, one a word (``w17``), with a ChatML-like template; pad and end of text are one, as Dream's."""
    vocabulary = [*SPECIAL, *ROLES, *(f"w{i}" for i in range(words - len(SPECIAL) - len(ROLES)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
    )


def dream(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Qwen2ForCausalLM:
    """A Dream-type denoiser with random weights."""
    config = Qwen2Config(**_sizes(shape), rope_theta=1e6, tie_word_embeddings=False)
    model = _build(Qwen2ForCausalLM, config, dtype, device, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_SPREAD / (config.initializer_range * shape.hidden**0.5))
    return model


def skywork(
    shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 1
) -> Qwen3ForSequenceClassification:
    """A Skywork-Reward-V2-type reward model with random weights."""
    config = Qwen3Config(
        **_sizes(shape),
        head_dim=shape.head_dim,
        rope_theta=1e6,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=0,
    )
    return _build(Qwen3ForSequenceClassification, config, dtype, device, seed)


def prompt(words: int) -> str:
    """A prompt of ``words`` words of the tokenizer."""
    return " ".join(f"w{(37 * i) % 101}" for i in range(words))


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        "vocab_size": shape.rows,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 4096,
    }


def _build(kind: type, config: object, dtype: torch.dtype, device: torch.device | str, seed: int) -> torch.nn.Module:
    """Weights in ``dtype`` on ``device`` from the start: a 7-billion model never exists in fp32 or on the host."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
