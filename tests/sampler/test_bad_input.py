"""Every mistake ends in one sentence that names it, before the first forward pass."""

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from entrgi import CallableDenoiser, MaskedLM, SamplerConfig, SequenceClassifierReward, generate, preset
from support import tiny

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
        (
            {"alg": "chance"},
            "alg must be one of entropy, maskgit_plus, topk_margin, anchor, random, origin, got 'chance'",
        ),
        ({"end_tokens": "some"}, "end_tokens must be one of eos, all, got 'some'"),
        ({"guidance": "both"}, "guidance must be one of entrgi, aps, expectation, gumbel, none, got 'both'"),
        ({"schedule": "cosine"}, "schedule must be one of paper, rgrl, uniform, got 'cosine'"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, got 'lion'"),
        ({"entropy_rule": "both"}, "entropy_rule must be one of"),
        ({"temperature": 1e-7}, r"temperature must be 0 or in \[1e-6, 1e6\], got 1e-07"),
        ({"temperature": -0.7}, r"temperature must be 0 or in \[1e-6, 1e6\], got -0.7"),
        ({"temperature": float("inf")}, r"temperature must be 0 or in \[1e-6, 1e6\], got inf"),
        ({"temperature": 0, "guidance": "gumbel"}, "temperature must be > 0 with guidance='gumbel'"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"top_p": float("nan")}, r"top_p must be in \[0, 1\], got nan"),
        ({"top_k": -1}, "top_k must be an integer >= 1, got -1"),
        ({"top_k": False}, "top_k must be an integer >= 1, got False"),
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
        ({"best_of": 3}, r"best_of must be >= num_return_sequences \(4\), got 3"),
        ({"best_of": 0}, "best_of must be .*got 0"),
        ({"best_of": 4.5}, "best_of must be .*got 4.5"),
        (
            {"guidance": "gumbel", "temperature": 0.01, "gumbel_temperature": 1e-5},
            r"gumbel_temperature times temperature \(0.01\) must be in \[1e-6, 1e6\], got 1e-05",
        ),
        ({"threshold": float("nan")}, "threshold must be .*got nan"),
        ({"threshold": "high"}, "threshold must be .*got 'high'"),
        ({"threshold": 0.5, "alg": "maskgit_plus", "alg_temp": 0.5}, "threshold.*alg_temp|alg_temp.*threshold"),
        ({"threshold": 0.5, "alg": "origin"}, "threshold.*origin|origin.*threshold"),
        ({"alg": "origin", "alg_temp": 0.5}, "alg_temp.*origin|origin.*alg_temp"),
        ({"block_length": 0}, "block_length must be .*got 0"),
        ({"block_length": 2.0}, "block_length must be .*got 2.0"),
        ({"guidance_interval": 0}, "guidance_interval must be .*got 0"),
        ({"guidance_interval": (5, 2)}, r"guidance_interval must be .*got \(5, 2\)"),
        ({"guidance_interval": (2, 2)}, r"guidance_interval must be .*got \(2, 2\)"),
        ({"guidance_interval": (-1, 2)}, r"guidance_interval must be .*got \(-1, 2\)"),
        ({"guidance_interval": (1, 2, 3)}, r"guidance_interval must be .*got \(1, 2, 3\)"),
        ({"guidance_interval": (0.5, 2)}, r"guidance_interval must be .*got \(0.5, 2\)"),
        ({"guidance_interval": 1.5}, "guidance_interval must be .*got 1.5"),
        ({"guidance_interval": "all"}, "guidance_interval must be .*got 'all'"),
        ({"guidance_interval": True}, "guidance_interval must be .*got True"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature must be > 0 and finite, got 0.0"),
        ({"row_bucket": 0}, "row_bucket must be an integer >= 1, got 0"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1, got 0"),
        ({"max_rows": 1.5}, "max_rows must be an integer >= 1, got 1.5"),
        ({"early_exit": "yes"}, "early_exit must be .*got 'yes'"),
        ({"infill": 1}, "infill must be .*got 1"),
        ({"deprioritize_eos": None}, "deprioritize_eos must be .*got None"),
        ({"cuda_graphs": 2}, "cuda_graphs must be .*got 2"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"temperature": "0.7"}, "temperature must be .*got '0.7'"),
        ({"temperature": None}, "temperature must be .*got None"),
        ({"top_p": "off"}, "top_p must be .*got 'off'"),
        ({"top_k": 2.5}, "top_k must be .*got 2.5"),
        ({"alg": None}, "alg must be one of .*got None"),
        ({"alg": ["entropy"]}, "alg must be one of .*got "),
    ],
    ids=str,
)
def test_options(option, message):
    with pytest.raises(ValueError, match=message):
        preset("paper", **option)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of paper, rgrl, got 'fast'"):
        preset("fast")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("fast", {}, "one of paper, rgrl, got 'fast'"),
        ({"steps": 4}, {}, "config .*dict|config .*{'steps': 4}"),
        (4, {}, "config .*4"),
        (None, {"colour": 1}, "unknown option 'colour'"),
        (None, {"remasking": "chance"}, "remasking .*got 'chance'|alg .*got 'chance'"),
        (None, {"remasking": "low_confidence", "alg": "entropy"}, "remasking.*alg|alg.*remasking"),
        (None, {"gen_length": 4, "max_new_tokens": 4}, "gen_length.*max_new_tokens|max_new_tokens.*gen_length"),
        (None, {"num_inference_steps": 4, "steps": 4}, "num_inference_steps.*steps"),
        (None, {"gen_length": 0}, "(max_new_tokens|gen_length) must be an integer >= 1, got 0"),
        (None, {"mask_id": 5}, "mask_id.* 4.* 5|mask_id.* 5.* 4"),
        (None, {"cuda_graphs": True}, "cuda_graphs.*cpu"),
        (SamplerConfig(), {"steps": 0}, "steps must be an integer >= 1, got 0"),
        ("rgrl", {"alg": "origin", "alg_temp": 1.0}, "alg_temp"),
        (None, {"max_new_tokens": 7, "block_length": 2, "steps": 3}, "steps.* 3.* 4|steps.* 4.* 3"),
        (None, {"max_new_tokens": 5, "max_rows": 4}, "max_rows.* 4.* 5|max_rows.* 5.* 4"),
        (None, {"best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_arguments(pair, config, options, message):
    with pytest.raises(ValueError, match=message):
        generate("the", *pair, config, seed=0, **options)


def test_blocks_of_one_of_the_prompts(pair):
    """Two holes have their two blocks in two steps, five do not."""
    prompts = ["[MASK] the [MASK]", "[MASK] [MASK] [MASK] w1 [MASK] [MASK]"]
    options = {"infill": True, "max_new_tokens": 0, "block_length": 1, "steps": 2}
    with pytest.raises(ValueError, match="steps must be at least the number of blocks, got 2 for 5 blocks"):
        generate(prompts, *pair, seed=0, **options)


def test_early_exit_without_an_end_of_sequence(pair):
    denoiser, reward = pair
    denoiser.eos_token_id = None
    with pytest.raises(ValueError, match="early_exit"):
        generate("the", denoiser, reward, seed=0, early_exit=True, max_new_tokens=4, steps=4)


def test_seeds_of_all_that_are_made(pair):
    """With best_of, one seed for each of the N."""
    seeds = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"trajectory_seeds must be an int64 tensor \[1, 5\]"):
        generate("the", *pair, SamplerConfig(**SMALL), best_of=5, trajectory_seeds=seeds)


@pytest.mark.parametrize("callback", [1, "print"])
def test_callbacks_that_cannot_be_called(pair, callback):
    with pytest.raises(ValueError, match="callback_on_step_end"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, callback_on_step_end=callback)
    with pytest.raises(ValueError, match="streamer"):
        generate("the", *pair, SamplerConfig(**{**SMALL, "num_return_sequences": 1}), seed=0, streamer=callback)


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
        ([7], {}, r"prompts\[0\]: expected text or messages"),
        (None, {}, "prompts: expected text, a list of messages, or a list of either, got None"),
        ({"role": "user", "content": "the"}, {}, "prompts: expected text, a list of messages"),
        ([[{"role": "user"}]], {}, r"prompts\[0\]: expected text or messages"),
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
    reward.reader.max_length = 7
    with pytest.raises(ValueError, match=r"prompts\[1\] needs 8 tokens in the reward model's format.* context of 7"):
        generate(["the", "the movie"], denoiser, reward, SamplerConfig(**SMALL), seed=0)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ({"seed": 1, "generator": torch.Generator()}, "pass one of seed, generator and trajectory_seeds"),
        ({"seed": 1, "trajectory_seeds": torch.zeros(1, 2, dtype=torch.long)}, "pass one of"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        (
            {"trajectory_seeds": torch.zeros(2, 2, dtype=torch.long)},
            r"trajectory_seeds must be an int64 tensor \[1, 2\]",
        ),
        ({"trajectory_seeds": torch.zeros(1, 2)}, "trajectory_seeds must be an int64 tensor"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_seeds(pair, seeds, message):
    with pytest.raises(ValueError, match=message):
        generate("the", *pair, SamplerConfig(**SMALL), **seeds)


@pytest.mark.parametrize("name", ["forbidden_ids", "suppress_tokens"])
def test_forbidden_ids(pair, name):
    with pytest.raises(ValueError, match=f"{name}: 64 is not an id below 64"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, **{name: [64]})
    for wrong in (True, 3.0, "the"):
        with pytest.raises(ValueError, match=f"{name} must be integers, got {wrong!r}"):
            generate("the", *pair, SamplerConfig(**SMALL), seed=0, **{name: [5, wrong]})
    with pytest.raises(ValueError, match=f"{name} must be a sequence of integers, got 5"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, **{name: 5})
    with pytest.raises(ValueError, match="every id is forbidden"):
        generate("the", *pair, SamplerConfig(**SMALL), seed=0, **{name: range(64)})


@pytest.mark.parametrize("wrong", [-1, 64])
def test_a_mask_token_that_is_no_id(pair, wrong):
    denoiser, reward = pair
    denoiser.mask_token_id = wrong
    with pytest.raises(ValueError, match=f"mask_token_id: {wrong} is not an id below 64"):
        generate("the", denoiser, reward, SamplerConfig(**SMALL), seed=0)


def test_several_labels():
    model = BertForSequenceClassification(tiny.bert_config(num_labels=3))
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has 3 labels .* expected label="):
        SequenceClassifierReward(model, tiny.tokenizer())


def test_reward_without_inputs_embeds():
    model = BertForSequenceClassification(tiny.bert_config(num_labels=1))
    model.forward = lambda input_ids, attention_mask: None
    with pytest.raises(ValueError, match=r"does not take inputs_embeds"):
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


@pytest.mark.parametrize("given", [None, "skywork"])
def test_models_that_are_none(pair, given):
    with pytest.raises(ValueError, match=r"reward: expected one of entrgi\.rewards or an object"):
        generate("the", pair[0], given, **SMALL)
    with pytest.raises(ValueError, match=r"denoiser: expected one of entrgi\.denoisers or an object"):
        generate("the", given, pair[1], **SMALL)
