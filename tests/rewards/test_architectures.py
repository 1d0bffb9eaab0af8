"""Masks and kept prefixes against each architecture's own forward pass."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from entrgi import LogLikelihoodReward, SequenceClassifierReward
from entrgi.models import attention as attentions
from entrgi.rewards import attention_mask
from entrgi.rewards.prefix import PrefixCache
from support import architectures, binding, tiny
from support.host_reads import NoHostReads

PROMPTS, WINDOWS, COPIES = ["the movie was w1 w2 w3 w4", "w5"], [8, 6], 2
CAUSAL, BIDIRECTIONAL = architectures.CAUSAL, architectures.BIDIRECTIONAL
OLD = int(transformers.__version__.split(".")[0]) < 5


def build(kind, **options):
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no classifier of type {kind}")
    chat = None if kind in BIDIRECTIONAL else tiny.CHAT
    return SequenceClassifierReward(architectures.classifier(kind), tiny.tokenizer(chat=chat), **options)


def own_forward(reward, places, ids):
    """Every trajectory alone through the model's own code, with its own two-dimensional mask."""
    values, gradients = [], []
    for row, place in zip(ids, [place for place in places for _ in range(COPIES)], strict=True):
        prefix, suffix = reward.reader.format.frame(place.prompt, place.before)
        window = row[place.start : place.stop]
        whole = torch.tensor([[*prefix, *window.tolist(), *suffix]])
        response = torch.zeros_like(whole, dtype=torch.bool)
        response[0, len(prefix) : len(prefix) + len(window)] = True
        visible = attention_mask(whole, torch.ones_like(response), response, binding.EOS, binding.PAD)
        embeds = reward.model.get_input_embeddings()(whole).requires_grad_()
        if not hasattr(reward.head, "backbone"):
            value = reward.model(inputs_embeds=embeds, attention_mask=visible.long()).logits[0, 0]
        else:
            hidden = reward.model.base_model(
                inputs_embeds=embeds,
                attention_mask=visible.long(),
                position_ids=torch.arange(whole.shape[1])[None],
                use_cache=False,
            ).last_hidden_state
            head = [getattr(reward.model, name, None) for name in ("score", "head", "classifier")]
            value = torch.nn.Sequential(*filter(None, head))(hidden[0, visible[0].nonzero().max()])[0]
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, embeds)[0][0, response[0]])
    return torch.stack(values), torch.cat(gradients)


def compare(kind, reward):
    precise = 1e-10 if kind in architectures.DOUBLE_PRECISION else 1e-5
    assert reward.weight.dtype == (torch.float32 if kind in architectures.SINGLE_PRECISION else torch.float64)
    places = binding.layouts(PROMPTS, WINDOWS)
    bound = reward.bind(binding.denoiser(), places, COPIES)
    ids = binding.tokens(places, COPIES)
    ids[1, places[0].start + 4] = binding.EOS  # hides the three that follow, up to the suffix
    ids[2, places[1].start + 1] = binding.PAD  # hides itself
    expected, expected_gradient = own_forward(reward, places, ids)
    value, gradient = binding.window_gradient(bound, ids, places, COPIES)
    torch.testing.assert_close(value, expected, rtol=precise, atol=precise)
    scale = float(expected_gradient.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=precise, atol=precise * scale)
    return bound


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal(kind, reuse_prefix):
    reward = build(kind, reuse_prefix=reuse_prefix)
    assert reward.reuse_prefix is reuse_prefix
    compare(kind, reward)


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_bidirectional(kind):
    compare(kind, build(kind))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pooling(pooling):
    model = architectures.classifier("modernbert", classifier_pooling=pooling)
    compare("modernbert", SequenceClassifierReward(model, tiny.tokenizer()))


@pytest.mark.parametrize(
    ("kind", "options", "keeps_prefix"),
    [
        ("apertus", {}, True),
        ("biogpt", {}, True),
        ("ernie4_5", {}, True),
        ("gpt_neo", {}, True),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),  # it places tokens by counting visible ones
        ("deberta-v2", {}, False),
    ],
)
def test_architectures_that_nobody_listed(kind, options, keeps_prefix):
    """Whether a prefix can be kept is found out by trying."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    chat = None if kind == "deberta-v2" else tiny.CHAT
    if CONFIG_MAPPING[kind] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        reward = LogLikelihoodReward(architectures.causal_lm(kind), tiny.tokenizer(chat=chat))
    else:
        model = gpt_neo() if kind == "gpt_neo" else architectures.classifier(kind, **options)
        reward = SequenceClassifierReward(model, tiny.tokenizer(chat=chat))
        if kind != "bloom":
            compare(kind, reward)
    assert reward.reuse_prefix is keeps_prefix


@pytest.mark.parametrize("part", ["masks", "prefix"])
def test_what_computes_something_else_is_left_alone(part, monkeypatch):
    """Names of attention that stay the model's own, and whole sequences in every pass."""
    if part == "masks":
        monkeypatch.setattr(attentions, "_additive", lambda allowed, dtype: torch.zeros(allowed.shape, dtype=dtype))
    else:
        monkeypatch.setattr(PrefixCache, "get_seq_length", lambda *_: 0)
    reward = build("mistral")
    assert (reward.model.config._attn_implementation == "sdpa") is (part == "masks")
    assert reward.reuse_prefix is (part == "masks")
    compare("mistral", reward)


def gpt_neo():
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    common = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 40, "num_labels": 1, "pad_token_id": 0}
    config = CONFIG_MAPPING["gpt_neo"](**common, **options, initializer_range=0.2)
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config).eval().double().requires_grad_(False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral", "bert", "distilbert", "roberta", "modernbert"])
def test_attention_implementations(kind, attention):
    model = architectures.classifier(kind)
    model.set_attn_implementation(attention)
    compare(kind, SequenceClassifierReward(model, tiny.tokenizer(chat=None if kind in BIDIRECTIONAL else tiny.CHAT)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_position_with_nothing_to_see(dtype):
    """A hidden position whose window holds hidden ones only; the library's own masks make it NaN here."""
    values = []
    for attention in ("eager", "sdpa"):
        model = architectures.classifier("mistral").to(dtype)
        model.set_attn_implementation(attention)
        reward = SequenceClassifierReward(model, tiny.tokenizer(chat=tiny.CHAT))
        places = binding.layouts(PROMPTS, WINDOWS)
        ids = binding.tokens(places, COPIES)
        ids[:, places[1].start] = binding.EOS
        values.append(binding.value_and_gradient(reward.bind(binding.denoiser(), places, COPIES), ids))
    close = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(values[0][0], values[1][0], rtol=close, atol=close)
    assert all(gradient.isfinite().all() for _, gradient in values)


@pytest.mark.parametrize("kind", [*CAUSAL, *BIDIRECTIONAL])
def test_nothing_reads_the_device(kind):
    if OLD and kind in [*BIDIRECTIONAL, "gemma", "gemma2", "mixtral", "qwen3_moe"]:
        pytest.skip(f"transformers {transformers.__version__} itself reads the device in {kind}")
    reward = build(kind)
    places = binding.layouts(PROMPTS, WINDOWS)
    bound = reward.bind(binding.denoiser(), places, COPIES)
    ids = binding.tokens(places, COPIES)
    trajectories, positions = torch.tensor([0, 1, 3]), torch.tensor([9, 10, 3])
    with NoHostReads():
        embeds, columns = bound.inputs(ids)
        bound.row_index(trajectories, positions)
        leaf = embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(bound(leaf, columns).sum(), leaf)
    assert gradient.abs().sum() > 0
