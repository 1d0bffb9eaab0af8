"""A reward over embeddings is its model's own score over ids, alone and without padding, or is refused."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    BertForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from entrgi import LogLikelihoodReward, SequenceClassifierReward
from entrgi.prompts import Completion
from entrgi.rewards import classifier
from entrgi.rewards.own_score import probes
from entrgi.vocabulary import align
from rewards.test_architectures import BIDIRECTIONAL, CAUSAL
from support import architectures, binding, tiny

TEXTS = [Completion("w5", f"w5 {text}", text) for text in ("w1 w2 the movie w3", "w4", "was good w9 w11 w12 bad w13")]
# Beside those whose masks are prepared.
OTHERS = {
    "big_bird": {"attention_type": "original_full"},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "deberta-v2": {},
    "electra": {"embedding_size": 16},
    "esm": {"token_dropout": True, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "flaubert": {"emb_dim": 32, "n_heads": 4, "n_layers": 2},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "squeezebert": {"embedding_size": 32},
    "xlm": {"emb_dim": 32, "n_heads": 4, "n_layers": 2},
}
# Padding enters the first three, the next pools at the last position or the last id; the last needs ids.
REFUSED = {
    "convbert": ({"embedding_size": 16}, "over embeddings"),
    "fnet": ({}, "over embeddings"),
    "ctrl": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}, "over embeddings"),
    "xlnet": ({"d_model": 32, "n_head": 4, "d_inner": 48, "n_layer": 2}, "over embeddings"),
    "longformer": ({"attention_window": [4, 4, 4]}, "LongformerFor.* cannot be read over embeddings: TypeError"),
    "ibert": ({}, "its embedding layer returns a tuple, expected a tensor"),
}
NAMES = sorted({*CAUSAL, *BIDIRECTIONAL, *OTHERS})


def build(kind, **options):
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        pytest.skip(f"no classifier of type {kind}")
    given = architectures.OPTIONS.get(kind, {"initializer_range": 0.3}) | OTHERS.get(kind, {}) | options
    if kind not in ("funnel", "xlnet"):
        model = architectures.classifier(kind, **given)
    else:  # their configs refuse fields that all others have
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](vocab_size=64, num_labels=1, pad_token_id=0, **given)
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("score" in name or "classifier" in name or "proj" in name):
                parameter.normal_(std=0.3)  # heads are born small
    return model


def own_scores(reward, completions=TEXTS):
    rows = [torch.tensor([reward.reader.ids(completion)[0]]) for completion in completions]
    with torch.no_grad():
        return torch.stack([reward.model(input_ids=row).logits[0, reward.label] for row in rows]).float()


@pytest.mark.parametrize("chat", [None, tiny.CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", NAMES)
def test_padded_batches_have_the_models_own_scores(kind, chat):
    reward = SequenceClassifierReward(build(kind), tiny.tokenizer(chat=chat))
    torch.testing.assert_close(reward.score(TEXTS), own_scores(reward), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*CAUSAL, "bloom", "openai-gpt"])
def test_a_template_that_ends_in_the_padding_id(kind):
    """Causal classifiers pool before it, over ids; what is guided ends there as well."""
    reward = SequenceClassifierReward(build(kind, pad_token_id=3), tiny.tokenizer(chat=tiny.CHAT))
    ids = reward.tokenizer("user : w5 [SEP] assistant : w4 [SEP]", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        own = reward.model(input_ids=ids["input_ids"]).logits[0, 0].float()
    torch.testing.assert_close(reward.score(TEXTS)[1], own, rtol=1e-5, atol=1e-5)
    _, suffix = reward.reader.format.frame("w5", [])
    assert suffix == [3]
    layout = binding.layouts(["w5"], [3])[0]
    assert reward.reader.frame(layout, binding.denoiser(), align(tiny.tokenizer(), 64, reward.tokenizer)).suffix == []


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("ends", [True, False], ids=["ends", "fills its window"])
@pytest.mark.parametrize("chat", [None, tiny.CHAT], ids=["plain", "chat"])
def test_a_response_whose_end_is_the_padding_id(chat, ends, reuse_prefix):
    """Guided as it is scored: the last id that is read is that of the text."""
    tok = tiny.tokenizer(chat=chat)
    if chat is None:
        tok.cls_token = tok.sep_token = None
    reward = SequenceClassifierReward(build("llama", pad_token_id=binding.EOS), tok, reuse_prefix=reuse_prefix)
    places = binding.layouts(["the movie"], [4])
    ids = binding.tokens(places, 2)
    length = 2 if ends else 4
    ids[:, places[0].start + length : places[0].stop] = binding.EOS
    words = [[tiny.WORDS[i] for i in row[places[0].start :][:length]] for row in ids.tolist()]
    completions = [Completion("the movie", f"the movie {' '.join(w)}", " ".join(w)) for w in words]
    value, _ = binding.value_and_gradient(reward.bind(binding.denoiser(), places, 2), ids)
    torch.testing.assert_close(value.float(), reward.score(completions), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.float(), own_scores(reward, completions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_that_read_more_than_embeddings(kind, monkeypatch):
    options, message = REFUSED[kind]
    model = build(kind, **options)
    with pytest.raises(ValueError, match=f"^reward: .*{message}"):
        SequenceClassifierReward(model, tiny.tokenizer())
    if message != "over embeddings":
        return
    monkeypatch.setattr(classifier, "check_own_score", lambda *_: None)
    reward = SequenceClassifierReward(model, tiny.tokenizer())
    assert (reward.score(TEXTS) - own_scores(reward)).abs().max() > 1e-3


class Member(BertForSequenceClassification):
    """A model that does something of its own over ids."""

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **options):
        if input_ids is not None:
            inputs_embeds = self.changed(input_ids, self.get_input_embeddings()(input_ids))
        output = super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        return SequenceClassifierOutput(logits=self.pooled(output.logits, inputs_embeds))

    def changed(self, ids, embeds):
        return embeds

    def pooled(self, logits, embeds):
        return logits


class Scaled(Member):
    def changed(self, ids, embeds):
        return embeds * 0.4


class ScaledByShare(Member):
    def changed(self, ids, embeds):
        return embeds * (1 - 0.9 * (ids < 60).double().mean()).to(embeds)


class AddsKinds(Member):
    def changed(self, ids, embeds):
        return embeds + 4 * (ids == 3)[..., None] * self.get_input_embeddings()(torch.tensor(9))


class LeavesOut(Member):
    def changed(self, ids, embeds):
        return embeds * (ids != 3)[..., None]


class CountsPadding(Member):
    def pooled(self, logits, embeds):
        return logits * embeds.shape[1] / 8


class ReadsTheEnd(Member):
    def pooled(self, logits, embeds):
        return logits + embeds[:, -1:].sum(dim=-1)


MEMBERS = [Scaled, ScaledByShare, AddsKinds, LeavesOut, CountsPadding, ReadsTheEnd]


def member(kind, dtype=torch.float32):
    torch.manual_seed(1)
    model = kind(tiny.bert_config(num_labels=1)).eval().to(dtype)
    with torch.no_grad():
        model.classifier.weight.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MEMBERS)
def test_models_that_read_more_than_embeddings(kind, dtype):
    number = r"-?[\d.e-]+"
    where = r"\((alone|in a batch padded to \d+)\)"
    with pytest.raises(
        ValueError,
        match=rf"reward: {kind.__name__} gives a text of \d+ tokens {number} over embeddings {where} and {number} over "
        rf"ids, expected the same up to {number}: it reads more",
    ):
        SequenceClassifierReward(member(kind, dtype), tiny.tokenizer())


@pytest.mark.parametrize("kind", [Scaled, CountsPadding])
def test_the_error_says_whether_padding_is_the_reason(kind):
    with pytest.raises(ValueError, match=r"\(alone\)" if kind is Scaled else r"\(in a batch padded to"):
        SequenceClassifierReward(member(kind), tiny.tokenizer())


def test_positions_that_are_counted_by_ids():
    """RoBERTa gives its padding id no place; here the text's end is that id."""
    with pytest.raises(ValueError, match="RobertaForSequenceClassification gives a text of"):
        SequenceClassifierReward(build("roberta", pad_token_id=3), tiny.tokenizer())


@pytest.mark.parametrize("kind", NAMES)
def test_rounding_is_tolerated(kind):
    """What differs between a batch and a single text in few bits is no other score."""
    for dtype in (torch.bfloat16, torch.float16):
        if kind == "mobilebert" and dtype == torch.float16:
            continue  # its numbers exceed the dtype's
        SequenceClassifierReward(build(kind).to(dtype), tiny.tokenizer())


class RoundsBatches(Member):
    def pooled(self, logits, embeds):
        return logits * (1 + 2**-5) if embeds.shape[0] > 1 else logits


def test_what_is_tolerated_depends_on_the_dtype():
    """The one of the least precise weights."""
    SequenceClassifierReward(member(RoundsBatches, torch.bfloat16), tiny.tokenizer())
    mixed = member(RoundsBatches)
    mixed.register_parameter("other", torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    SequenceClassifierReward(mixed, tiny.tokenizer())
    with pytest.raises(ValueError, match="RoundsBatches gives a text of"):
        SequenceClassifierReward(member(RoundsBatches), tiny.tokenizer())


class ScaledLM(LlamaForCausalLM):
    def forward(self, input_ids=None, inputs_embeds=None, **options):
        embeds = inputs_embeds if input_ids is None else self.get_input_embeddings()(input_ids) * self.factor(input_ids)
        return super().forward(inputs_embeds=embeds, **options)

    def factor(self, ids):
        return 1 + 8 * (ids >= 30).double().mean()  # none of the first ids, which the check of the logits reads


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_likelihoods(dtype, monkeypatch):
    torch.manual_seed(0)
    model = ScaledLM(architectures.config("llama")).eval().to(dtype)
    with pytest.raises(ValueError, match=r"reward: ScaledLM gives a text of \d+ tokens -.* over embeddings \(alone\)"):
        LogLikelihoodReward(model, tiny.tokenizer(chat=tiny.CHAT))
    monkeypatch.setattr(ScaledLM, "factor", lambda self, ids: 1)
    LogLikelihoodReward(model, tiny.tokenizer(chat=tiny.CHAT))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chat", [None, tiny.CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gemma3_text", "qwen3", "opt", "mistral"])
def test_padded_batches_have_the_models_own_likelihoods(kind, chat, normalize):
    options = {"word_embed_proj_dim": 16} if kind == "opt" else {}
    reward = LogLikelihoodReward(
        architectures.causal_lm(kind, **options), tiny.tokenizer(chat=chat), normalize=normalize
    )
    with torch.no_grad():
        own = torch.cat(
            [reward.head.own_score(torch.tensor([ids]), begin) for ids, begin in map(reward.reader.ids, TEXTS)]
        )
    torch.testing.assert_close(reward.score(TEXTS), own.float(), rtol=1e-5, atol=1e-5)


class Draws(Member):
    def pooled(self, logits, embeds):
        return logits + self.size * torch.randn_like(logits)

    size = 1e-6


def test_a_model_that_draws_at_random(monkeypatch):
    """Least-significant differences, of the order of sums, are none."""
    SequenceClassifierReward(member(Draws), tiny.tokenizer())
    monkeypatch.setattr(Draws, "size", 1e-2)
    number = r"-?[\d.e-]+"
    with pytest.raises(
        ValueError,
        match=rf"reward: Draws gives the same text of \d+ tokens two scores, {number} and {number}, expected one: ",
    ):
        SequenceClassifierReward(member(Draws), tiny.tokenizer())


@pytest.mark.parametrize("kind", [Member, Draws])
def test_global_random_state_is_left_alone(kind):
    model = member(kind)
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    SequenceClassifierReward(model, tiny.tokenizer())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("compile", [False, True])
def test_it_costs_a_few_short_passes(compile, monkeypatch):
    """On the plain model: nothing is compiled for the shapes of the probes."""
    sizes, compiled = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(len(sizes)))
    model = tiny.qwen3_classifier()
    model.model.register_forward_hook(lambda *x: sizes.append(x[-1].last_hidden_state.shape[:2].numel()))
    SequenceClassifierReward(model, tiny.tokenizer(chat=tiny.CHAT), compile=compile)
    assert len(sizes) == 12
    assert sum(sizes) < 320
    assert compiled == ([12] if compile else [])


def test_the_probes():
    """They differ in length, also in a short context, and are texts of the tokenizer's own tokens."""
    for max_length in (None, 40, 9, 5, 2):
        rows = probes(tiny.qwen3_reward(max_length=max_length).reader)
        assert len(rows[0][0]) > len(rows[1][0]) or max_length == 2
        assert all(len(ids) <= (max_length or 40) for ids, _ in rows)
        assert len(set(rows[0][0])) > 1
        assert 1 not in rows[0][0], "nothing unknown"
    assert len(probes(tiny.qwen3_reward(max_length=1).reader)[0][0]) == 1


@pytest.mark.filterwarnings("error")
def test_a_short_context_is_not_warned_of():
    tiny.bert_reward(max_length=6)


def test_a_template_that_refuses_the_probes():
    """An error where it is used, as before."""
    chat = "{{ raise_exception('not like that') }}"
    reward = SequenceClassifierReward(tiny.qwen3_classifier(), tiny.tokenizer(chat=chat))
    with pytest.raises(ValueError, match="not like that"):
        reward.score(TEXTS)


@pytest.mark.parametrize("make", [SequenceClassifierReward, LogLikelihoodReward])
def test_a_model_without_weights(make):
    with torch.device("meta"):
        model = (
            architectures.classifier("llama") if make is SequenceClassifierReward else architectures.causal_lm("llama")
        )
    with pytest.raises(ValueError, match="reward: its embedding is on the meta device, expected loaded weights"):
        make(model, tiny.tokenizer())


def test_a_text_with_the_mask_token_of_esm():
    """The share of it scales all others, over ids."""
    reward = SequenceClassifierReward(build("esm"), tiny.tokenizer())
    with pytest.raises(ValueError, match=r"EsmFor.* scales all embeddings by the share of '\[MASK\]', expected none"):
        reward.score([Completion("", "w1 [MASK] w2", "w1 [MASK] w2")])
