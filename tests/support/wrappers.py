"""Every class that takes a user's model, with a tiny model of its own, and what may be seen of a model from outside."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from entrgi import (
    CallableDenoiser,
    CallableReward,
    DreamDenoiser,
    LLaDADenoiser,
    LogLikelihoodReward,
    MaskedLM,
    SequenceClassifierReward,
    WeightedReward,
    generate,
)
from support import architectures, tiny

DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
_DECODER = {
    "vocab_size": tiny.LOGITS_WIDTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny.CONTEXT,
    "attention_dropout": 0.5,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 5, "steps": 5, "guidance_lr": 2.0}
PROMPTS = ["the movie", "w3 was good w4"]


class Pooling(nn.Module):
    """A reward of input embeddings, with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, embeds, mask):
        hidden = self.dropout(torch.tanh(self.layer(embeds)))
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def _bert(**options):
    return BertForMaskedLM(tiny.bert_config(**DROPOUT, **options))


def _modernbert():
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    return ModernBertForMaskedLM(ModernBertConfig(**common, num_attention_heads=4, mlp_dropout=0.5))


def _dream():
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER))


def _llada():
    return LlamaForCausalLM(LlamaConfig(**_DECODER))


def _classifier(kind, **options):
    model = architectures.classifier(kind, **options).float()
    return model.requires_grad_(True)


def _causal(kind):
    return architectures.causal_lm(kind).float().requires_grad_(True)


def _decoded(cls):
    return lambda model, tok: cls(model, tok, mask_token_id=4, eos_token_id=3, pad_token_id=0, chat=False)


def _chat(cls):
    return lambda model, tok: cls(model, tiny.tokenizer(chat=tiny.CHAT))


def _callable_reward(model, tok):
    table = torch.randn(tiny.LOGITS_WIDTH, 8, generator=torch.Generator().manual_seed(0))
    return CallableReward(model, tok, table)


def _weighted(model, tok):
    with torch.inference_mode(False):
        other = tiny.qwen3_reward()
    return WeightedReward([SequenceClassifierReward(model, tok), other], [1.0, 0.5])


@dataclass(frozen=True)
class Kind:
    """``model()`` is as a user has it, in training; ``wrap(model, tokenizer)`` is what the class makes of it."""

    build: object
    wrap: object
    is_denoiser: bool

    def model(self):
        torch.manual_seed(0)
        return self.build().train()

    def make(self, model):
        return self.wrap(model, tiny.tokenizer())

    def pair(self, wrapped):
        """(denoiser, reward) with ``wrapped`` as one of them."""
        with torch.inference_mode(False):
            return (wrapped, tiny.bert_reward()) if self.is_denoiser else (tiny.denoiser(), wrapped)

    def generate(self, wrapped, seed=1, prompts=PROMPTS, **options):
        return generate(prompts, *self.pair(wrapped), seed=seed, **{**OPTIONS, **options})


KINDS = {
    "MaskedLM": Kind(_bert, MaskedLM, True),
    "MaskedLM modernbert": Kind(_modernbert, MaskedLM, True),
    "Dream": Kind(_dream, _decoded(DreamDenoiser), True),
    "LLaDA": Kind(_llada, _decoded(LLaDADenoiser), True),
    "CallableDenoiser": Kind(_bert, CallableDenoiser, True),
    "classifier bert": Kind(lambda: _classifier("bert", **DROPOUT), SequenceClassifierReward, False),
    "classifier qwen3": Kind(
        lambda: _classifier("qwen3", attention_dropout=0.5), _chat(SequenceClassifierReward), False
    ),
    "classifier gemma2": Kind(lambda: _classifier("gemma2"), _chat(SequenceClassifierReward), False),
    "likelihood tied": Kind(lambda: _causal("gpt2"), _chat(LogLikelihoodReward), False),
    "likelihood untied": Kind(lambda: _causal("llama"), _chat(LogLikelihoodReward), False),
    "CallableReward": Kind(Pooling, _callable_reward, False),
    "WeightedReward": Kind(lambda: _classifier("bert", **DROPOUT), _weighted, False),
}
TRANSFORMERS = [name for name in KINDS if name != "CallableReward"]
REWARDS = [name for name, kind in KINDS.items() if not kind.is_denoiser]


def frozen(model):
    """A copy of ``model`` as it is now, in evaluation mode and without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def appearance(model):
    """All that can be seen of a model: tensors, modes, hooks, attributes, configs."""
    seen = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if key != "training"}
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        members = {key: id(value) for key, value in module._modules.items()}
        seen[name] = (type(module), module.training, attributes, hooks, members)
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            seen[name] += (config.to_dict(), config._attn_implementation)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[name, "tensor"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad, tensor._version)
    return seen


def same_output(a, b):
    return torch.equal(a.sequences, b.sequences) and torch.equal(a.rewards, b.rewards) and a.texts == b.texts
