"""Tiny models as checkpoint folders, for what is named on a command line."""

import json
from pathlib import Path

import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from support import tiny

OTHER_WORDS = [*tiny.SPECIAL, *tiny.WORDS[-1:4:-1]]  # the same words in another order, without the last few
OTHER_WORDS = OTHER_WORDS[:-4]


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def change_config(folder, without=(), **fields):
    """``folder`` with fields of its config.json set, and those of ``without`` taken out before."""
    file = Path(folder) / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in before.items() if name not in without} | fields))
    return folder


def denoiser(folder, chat=None):
    torch.manual_seed(0)
    return save(folder, BertForMaskedLM(tiny.bert_config()), tiny.tokenizer(chat=chat))


def reward(folder, seed=1, words=tiny.WORDS):
    torch.manual_seed(seed)
    return save(folder, BertForSequenceClassification(tiny.bert_config(num_labels=1)), tiny.tokenizer(words))


def language_model(folder):
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=tiny.LOGITS_WIDTH,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=tiny.CONTEXT,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return save(folder, Qwen3ForCausalLM(config), tiny.tokenizer())


def adapter(folder, base, task, seed):
    """A LoRA adapter of ``base`` with weights that change what it computes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    auto = AutoModelForMaskedLM if task is None else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type=task)
    get_peft_model(auto.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)
