"""Tiny random models over one made-up vocabulary, built in memory."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from entrgi import MaskedLM, SequenceClassifierReward

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "movie", "was", "good", "bad", "user", "assistant", "system", ":"]
WORDS += [f"w{i}" for i in range(46)]
LOGITS_WIDTH = 64  # a few ids more than the tokenizer knows, as padded output layers have
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
CONTEXT = 40


def tokenizer(words=WORDS, chat=None, pad="[PAD]"):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        chat_template=chat,
    )


def bert_config(**options):
    return BertConfig(
        **{
            "vocab_size": LOGITS_WIDTH,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.3,
            **options,
        }
    )


def denoiser(dtype=torch.float32, tok=None, seed=0, device="cpu"):
    torch.manual_seed(seed)
    return MaskedLM(BertForMaskedLM(bert_config()).to(device, dtype), tok or tokenizer())


def bert_reward(dtype=torch.float32, tok=None, seed=1, device="cpu", **options):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(bert_config(num_labels=1)).to(device, dtype)
    return SequenceClassifierReward(model, tok or tokenizer(), **options)


def qwen3_classifier(dtype=torch.float32, seed=2):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=LOGITS_WIDTH,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
    )
    return Qwen3ForSequenceClassification(config).to(dtype)


def qwen3_reward(dtype=torch.float32, seed=2, device="cpu", **options):
    return SequenceClassifierReward(qwen3_classifier(dtype, seed).to(device), tokenizer(chat=CHAT), **options)
