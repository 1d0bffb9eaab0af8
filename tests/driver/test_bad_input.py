"""Every mistake ends in one sentence that names it, before the first forward pass."""

import pytest
import tiny
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from entrgi import CallableDenoiser, MaskedLM, SamplerConfig, SequenceClassifierReward, generate, preset
from entrgi.vocabulary import align_embedding, undecodable

SMALL = {"num_return_sequences": 2, "max_new_tokens": 4, "steps": 4}


@pytest.fixture
def pair():
    """Models that fail the test when they are run."""
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()

    def never(*_args, **_kwargs):
        raise AssertionError("generation has started")

    denoiser.model.forward, reward.model.forward = never, never
    return denoiser, reward


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alg": "origin"}, "alg must be one of entropy, maskgit_plus, topk_margin, anchor, got 'origin'"),
        ({"guidance": "gumbel"}, "guidance must be one of entrgi, aps, expectation, none, got 'gumbel'"),
        ({"entropy_rule": "both"}, "entropy_rule must be one of"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"temperature": -0.7}, "temperature must be > 0 and finite, got -0.7"),
        ({"temperature": float("inf")}, "temperature must be > 0 and finite, got inf"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"top_p": float("nan")}, r"top_p must be in \[0, 1\], got nan"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"alg_temp": -1.0}, "alg_temp must be >= 0, got -1.0"),
        ({"guidance_lr": 0}, "guidance_lr must be > 0 and finite, got 0"),
        ({"guidance_steps": 0}, "guidance_steps must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": -1, "infill": True}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"reward_scale": float("nan")}, "reward_scale must be finite, got nan"),
        ({"logits_dtype": torch.int32}, "logits_dtype must be None or a floating torch dtype, got torch.int32"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
    ids=str,
)
def test_options(option, message):
    with pytest.raises(ValueError, match=message):
        preset("paper", **option)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of paper, got 'fast'"):
        preset("fast")


def test_paper_preset():
    config = preset("paper")
    assert (config.num_return_sequences, config.steps, config.max_new_tokens) == (4, 128, 128)
    assert (config.guidance_steps, config.guidance_lr, config.temperature, config.top_p) == (3, 0.5, 0.7, 0.95)
    assert (config.top_k, config.alg, config.guidance, config.logits_dtype) == (None, "entropy", "entrgi", None)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("the [MASK]", {}, r"prompts\[0\] holds the mask token \(id 4\) 1 times; pass infill=True"),
        (["the", "[MASK] [MASK]"], {}, r"prompts\[1\] holds the mask token \(id 4\) 2 times"),
        ("the", {"max_new_tokens": 0, "infill": True}, r"prompts\[0\] holds no mask token"),
        (
            " ".join(["w1"] * 35),
            {},
            r"prompts\[0\] needs 41 tokens \(37 of prompt .* expected at most the denoiser's context of 40",
        ),
        ([], {}, "prompts must hold at least one prompt"),
        ([7], {}, "prompts: expected text or messages"),
        (None, {}, "prompts: expected text, a list of messages, or a list of either, got None"),
        ({"role": "user", "content": "the"}, {}, "prompts: expected text, a list of messages"),
        ([[{"role": "user"}]], {}, "prompts: expected text or messages"),
        ([{"role": "user", "content": "the"}], {}, "prompts: got chat messages, expected text"),
        ("the", {"logits_dtype": torch.float64}, "logits_dtype is torch.float64 .* torch.float32"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_prompts(pair, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(prompts, *pair, SamplerConfig(**{**SMALL, **options}), seed=0)


def test_reward_context(pair):
    denoiser, reward = pair
    reward.max_length = 7
    with pytest.raises(ValueError, match=r"prompts\[1\] needs 8 tokens in the reward model's format.* context of 7"):
        generate(["the", "the movie"], denoiser, reward, SamplerConfig(**SMALL), seed=0)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ({"seed": 1, "generator": torch.Generator()}, "pass one of seed, generator and trajectory_seeds"),
        ({"seed": 1, "trajectory_seeds": torch.zeros(1, 2, dtype=torch.long)}, "pass one of"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"trajectory_seeds": torch.zeros(2, 2, dtype=torch.long)}, r"trajectory_seeds must be int64 \[1, 2\]"),
        ({"trajectory_seeds": torch.zeros(1, 2)}, "trajectory_seeds must be int64"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_seeds(pair, seeds, message):
    with pytest.raises(ValueError, match=message):
        generate("the", *pair, SamplerConfig(**SMALL), **seeds)


def test_forbidden_ids(pair):
    with pytest.raises(ValueError, match="forbidden_ids: 64 is not an id below 64"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, forbidden_ids=[64])
    with pytest.raises(ValueError, match="every id is forbidden"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, forbidden_ids=range(64))


def test_different_vocabularies(pair):
    words = [*tiny.WORDS[:-1], "other"]
    reward = tiny.bert_reward(tok=tiny.tokenizer(words))
    with pytest.raises(ValueError, match=r"59 have the same id in both\. Vocabulary alignment .* not available yet"):
        generate("the", pair[0], reward, SamplerConfig(**SMALL), seed=0)


def test_reward_embedding_smaller_than_its_tokenizer():
    with pytest.raises(ValueError, match="its embedding has 50 rows, its tokenizer ids up to 59"):
        align_embedding(torch.zeros(50, 4), tiny.tokenizer(), tiny.tokenizer(), 64)


@pytest.mark.parametrize(("width", "rows"), [(60, 60), (64, 64), (64, 60), (60, 64), (70, 64)])
@pytest.mark.parametrize("missing", ["unk", "zero"])
def test_alignment(width, rows, missing):
    weight = torch.randn(rows, 4)
    got = align_embedding(weight, tiny.tokenizer(), tiny.tokenizer(), width, missing)
    assert torch.equal(got[:60], weight[:60])
    assert got.shape == (width, 4)
    assert torch.equal(got[60:], (weight[1] if missing == "unk" else torch.zeros(4)).expand(width - 60, 4))
    assert undecodable(tiny.tokenizer(), width).nonzero().flatten().tolist() == list(range(60, width))
    if width == 60:
        assert got.data_ptr() == weight.data_ptr(), "nothing to change, nothing to copy"


def test_unknown_rule_for_missing_tokens():
    with pytest.raises(ValueError, match="missing must be one of unk, zero, got 'mean'"):
        align_embedding(torch.zeros(64, 4), tiny.tokenizer(), tiny.tokenizer(), 64, "mean")
    bare = tiny.tokenizer()
    bare.unk_token = None
    with pytest.raises(ValueError, match="missing='unk'"):
        align_embedding(torch.zeros(64, 4), bare, tiny.tokenizer(), 64)


def test_several_labels():
    model = BertForSequenceClassification(tiny.bert_config(num_labels=3))
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has num_labels 3, expected 1"):
        SequenceClassifierReward(model, tiny.tokenizer())


def test_reward_without_inputs_embeds():
    model = BertForSequenceClassification(tiny.bert_config(num_labels=1))
    model.forward = lambda input_ids, attention_mask: None
    with pytest.raises(ValueError, match=r"does not take inputs_embeds"):
        SequenceClassifierReward(model, tiny.tokenizer())


def test_reward_that_scales_its_embedding():
    model = BertForSequenceClassification(tiny.bert_config(num_labels=1))
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, rows: 2 * rows)
    with pytest.raises(ValueError, match=r"changes \(scales\) its embedding's rows"):
        SequenceClassifierReward(model, tiny.tokenizer())


def test_model_without_a_head():
    with pytest.raises(ValueError, match=r"BertModel has no language-model head"):
        MaskedLM(BertModel(tiny.bert_config()), tiny.tokenizer())


def test_tokenizer_without_a_mask_token():
    tok = tiny.tokenizer()
    tok.mask_token = None
    with pytest.raises(ValueError, match="tokenizer has no mask token"):
        MaskedLM(BertForMaskedLM(tiny.bert_config()), tok)
    with pytest.raises(ValueError, match=r"mask_token_id 4 .* vocab_size 3"):
        CallableDenoiser(lambda ids, mask: None, tiny.tokenizer(), 3)


@pytest.mark.parametrize("loader", [MaskedLM.from_pretrained, SequenceClassifierReward.from_pretrained])
def test_missing_files(loader, tmp_path):
    with pytest.raises(ValueError, match=r"(denoiser|reward): no folder .*nowhere"):
        loader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        loader(tmp_path)
    model = tiny.denoiser().model if loader == MaskedLM.from_pretrained else tiny.bert_reward().model
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer files"):
        loader(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"(denoiser|reward): cannot load"):
        loader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"(denoiser|reward): cannot load"):
        loader(tmp_path)


def test_checkpoint_without_the_head(tmp_path):
    """transformers would fill it at random."""
    tiny.denoiser().model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .* weights of BertForSequenceClassification"):
        SequenceClassifierReward.from_pretrained(tmp_path, num_labels=1)


def test_chat_template_that_hides_the_answer(pair):
    reward = tiny.bert_reward(tok=tiny.tokenizer(chat="{{ messages[0]['content'] }}"))
    with pytest.raises(ValueError, match="does not show the assistant's turn"):
        generate("the", pair[0], reward, SamplerConfig(**SMALL), seed=0)


def test_chat_template_that_refuses_the_messages(pair):
    reward = tiny.bert_reward(tok=tiny.tokenizer(chat="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ValueError, match="the chat template refuses 'the': roles must alternate"):
        generate("the", pair[0], reward, SamplerConfig(**SMALL), seed=0)


def test_infilling_for_a_chat_reward(pair):
    with pytest.raises(ValueError, match=r"prompts\[0\] is to be infilled"):
        generate("the [MASK]", pair[0], tiny.qwen3_reward(), SamplerConfig(**SMALL, infill=True), seed=0)
