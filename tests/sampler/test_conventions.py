"""What other samplers take: None and 0 for off, temperature 0, no reward, another prompt for it, template arguments."""

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch

import entrgi
from entrgi import SamplerConfig, generate
from entrgi.config import SamplerOptions
from entrgi.prompts import check_template_options, encode_prompt
from support import official_layouts as official
from support import tiny
from support.transcribe import tiny_models

SMALL = {"max_new_tokens": 6, "steps": 6, "num_return_sequences": 3, "seed": 2}


@pytest.fixture(scope="module")
def pair():
    return tiny.denoiser(), tiny.bert_reward()


# ---------------------------------------------------------------------------------------------------------- off


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"top_k": 0}, {"top_k": None}),
        ({"top_p": None}, {"top_p": 1.0}),
        ({"alg_temp": None}, {"alg_temp": 0.0}),
        ({"alg_temp": 0}, {"alg_temp": 0.0}),
        ({"remasking": "random"}, {"alg": "random"}),
        ({"remasking": "low_confidence"}, {"alg": "maskgit_plus"}),
        ({"eos_early_stop": True}, {"early_exit": True}),
        ({"logits_dtype": "bfloat16"}, {"logits_dtype": torch.bfloat16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [{}, {"top_k": 5, "top_p": 0.5}])
def test_other_words_for_the_same(base, given, same):
    assert entrgi.config.resolve(None, {**base, **given}) == SamplerConfig(**{**base, **same})


def test_options_for_editors_are_the_fields():
    """SamplerOptions, which nothing reads at run time."""
    own = {field.name: field.type for field in fields(SamplerConfig)}
    aliases = {alias: field.type for field in fields(SamplerConfig) for alias in field.metadata["aliases"]}
    written = {name: hint.__forward_arg__ for name, hint in SamplerOptions.__annotations__.items()}
    assert written == {**own, **aliases}
    assert {"gen_length", "num_inference_steps", "remasking", "eos_early_stop"} == set(aliases)


def test_a_config_is_plain_data():
    config = entrgi.preset("rgrl", logits_dtype="float64", guidance_interval=[1, 5], steps=7)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == replace(config) == eval(repr(config))
    assert hash(config) == hash(replace(config))
    assert SamplerConfig(**{**asdict(config), "logits_dtype": torch.float64}) == config
    with pytest.raises(FrozenInstanceError):
        config.steps = 3
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        replace(config, steps=0)


def test_every_option_is_documented():
    documented = re.findall(r"^ {8}(\w+): [A-Z]", SamplerConfig.__doc__, re.MULTILINE)
    assert documented == [field.name for field in fields(SamplerConfig)]


def test_the_old_name_of_the_number_of_trajectories():
    with pytest.warns(DeprecationWarning, match=r"trajectories is deprecated .*, use num_trajectories") as caught:
        assert SamplerConfig(best_of=7).trajectories == SamplerConfig(best_of=7).num_trajectories == 7
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["int8", "float33", "torch", ""])
def test_names_of_no_dtype(name):
    with pytest.raises(ValueError, match=f"logits_dtype must be None or a floating torch dtype, got '{name}'"):
        SamplerConfig(logits_dtype=name)


def test_suppressed_tokens_have_no_probability():
    """As in dllm's samplers, which set their logits to -inf: neither drawn nor in a confidence."""
    denoiser, _ = tiny_models(torch.float64)
    options = {"max_new_tokens": 6, "steps": 6, "seed": 2, "guidance": "none", "remasking": "low_confidence"}
    plain = generate("the", denoiser, **options).sequences
    most = int(plain[plain != tiny.tokenizer().pad_token_id].mode().values)
    suppressed = generate("the", denoiser, **options, suppress_tokens=[most]).sequences

    def without(ids, mask):
        logits = denoiser.model(input_ids=ids, attention_mask=mask).logits
        return logits.index_fill(-1, torch.tensor([most]), -math.inf)

    other = entrgi.CallableDenoiser(without, denoiser.tokenizer, denoiser.vocab_size)
    assert torch.equal(suppressed, generate("the", other, **options).sequences)
    assert not torch.equal(suppressed, plain)
    both = generate("the", denoiser, **options, suppress_tokens=[most], forbidden_ids=[5]).sequences
    assert torch.equal(both, generate("the", denoiser, **options, forbidden_ids=[5, most]).sequences)


def test_top_p_of_zero_is_not_off(pair):
    """It keeps the most probable token alone, as the method defines it."""
    first = generate("the", *pair, **SMALL, top_p=0.0, guidance="none").sequences
    assert not torch.equal(first, generate("the", *pair, **SMALL, top_p=None, guidance="none").sequences)


# ------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin", "anchor"])
def test_greedy_texts_know_no_seed(pair, alg):
    options = {**SMALL, "temperature": 0, "alg": alg, "guidance": "none"}
    rows = generate("the", *pair, **options).sequences[0]
    assert (rows == rows[0]).all()
    assert torch.equal(rows, generate("the", *pair, **{**options, "seed": 77}).sequences[0])
    warm = generate("the", *pair, **{**options, "temperature": 0.7}).sequences[0]
    assert not (warm == warm[0]).all()


def test_greedy_is_lladas_own_loop():
    """Temperature 0, low-confidence remasking, an even schedule: argmax, and the most probable first."""
    denoiser, _ = tiny_models(torch.float64)
    forbidden = torch.arange(tiny.LOGITS_WIDTH) >= len(tiny.WORDS)
    forbidden[4] = True
    tokens = torch.tensor([[2, 5, 6, *[4] * 8, 3]])
    for _ in range(4):
        with torch.no_grad():
            logits = denoiser.model(input_ids=tokens).logits[0].masked_fill(forbidden, -math.inf)
        best = logits.argmax(-1)
        confidence = logits.softmax(-1).gather(1, best[:, None])[:, 0].masked_fill(tokens[0] != 4, -math.inf)
        chosen = confidence.topk(2).indices
        tokens[0, chosen] = best[chosen]
    options = {"remasking": "low_confidence", "schedule": "uniform", "temperature": 0, "top_p": None}
    output = generate(
        "the movie",
        denoiser,
        None,
        **options,
        guidance="none",
        gen_length=8,
        steps=4,
        deprioritize_eos=False,
        num_return_sequences=1,
    )
    assert output.sequences[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("tie", ["all", "pair"])
def test_greedy_takes_the_first_of_equals(tie):
    """bf16 logits have many."""
    logits = torch.zeros(64) if tie == "all" else torch.arange(64) % 7 // 6 * 1.0
    denoiser = entrgi.CallableDenoiser(lambda ids, _mask: logits.expand(*ids.shape, 64).clone(), tiny.tokenizer(), 64)
    output = generate("the", denoiser, None, **SMALL, temperature=0, guidance="none")
    first, stop = output.windows[0]
    assert set(output.sequences[0, :, first:stop].flatten().tolist()) == {0 if tie == "all" else 6}


# --------------------------------------------------------------------------------------------- random remasking


def test_random_remasking_is_even():
    """Every position is as likely to be first; each step commits just what the schedule asks."""
    denoiser = entrgi.CallableDenoiser(lambda ids, _mask: torch.zeros(*ids.shape, 64), tiny.tokenizer(), 64)
    made, length = 500, 6
    first = torch.zeros(length)

    def count(state):
        if state.step == 0:
            first.add_(state.committed[:, 2 : 2 + length].sum(0))

    options = {"alg": "random", "guidance": "none", "schedule": "uniform", "steps": length, "max_new_tokens": length}
    generate("the", denoiser, None, num_return_sequences=made, seed=0, callback_on_step_end=count, **options)
    assert first.sum() == made
    expected = made / length
    assert ((first - expected) ** 2 / expected).sum() < 20.5  # chi squared of 5, p = 0.001


# -------------------------------------------------------------------------------------------------- no reward


def test_unguided_texts_need_no_reward(pair):
    denoiser, reward = pair
    options = {**SMALL, "guidance": "none"}
    judged = generate(["the", "the movie"], denoiser, reward, **options)
    alone = generate(["the", "the movie"], denoiser, **options)
    assert torch.equal(judged.sequences, alone.sequences)
    assert judged.texts == alone.texts
    assert alone.rewards.isnan().all()
    assert not judged.rewards.isnan().any()


@pytest.mark.parametrize("options", [{"guidance": "entrgi"}, {"guidance": "none", "best_of": 5}], ids=str)
def test_what_needs_a_reward(pair, options):
    with pytest.raises(ValueError, match=r"reward: expected one of entrgi\.rewards .*, got None with"):
        generate("the", pair[0], None, **{**SMALL, **options})


# --------------------------------------------------------------------------------- another prompt for the reward


def test_the_reward_may_read_another_prompt(pair):
    """The denoiser writes as before; guidance and the final score see the other prompt."""
    denoiser, reward = pair
    unguided = generate("the", denoiser, reward, guidance="none", reward_prompts="w1 w2", **SMALL)
    assert torch.equal(unguided.sequences, generate("the", denoiser, reward, guidance="none", **SMALL).sequences)
    assert unguided.texts == [[f"the {response}".strip() for response in unguided.responses[0]]], "what was written"
    texts = [f"w1 w2 {response}".strip() for response in unguided.responses[0]]
    scores = reward.score([entrgi.prompts.Completion("w1 w2", text, "") for text in texts])
    torch.testing.assert_close(unguided.rewards[0], scores, rtol=0, atol=0)

    guided = [generate("the", denoiser, reward, reward_prompts=other, **SMALL) for other in (None, "the", "w1 w2 bad")]
    assert torch.equal(guided[0].sequences, guided[1].sequences)
    assert not torch.equal(guided[0].sequences, guided[2].sequences)


def test_a_chat_for_the_reward(pair):
    denoiser, reward = pair[0], tiny.qwen3_reward()
    chat = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w1"}]
    output = generate("the", denoiser, reward, reward_prompts=[chat], **SMALL)
    expected = [entrgi.prompts.Completion(chat, response, response) for response in output.responses[0]]
    torch.testing.assert_close(output.rewards[0], reward.score(expected), rtol=0, atol=0)
    assert not torch.equal(output.sequences, generate("the", denoiser, reward, **SMALL).sequences)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", "b"], {}, "reward_prompts: expected one for each of 1 prompts, got 2"),
        ([], {}, "reward_prompts must hold at least one prompt"),
        (3, {}, "reward_prompts: expected text"),
        ([[{"role": "user", "content": None}]], {}, r"reward_prompts\[0\]: message 0 .* content None"),
        ("a", {"infill": True}, "reward_prompts: expected None with infill"),
        ("\ud800", {}, "reward_prompts.* half of a surrogate pair"),
        ("a", {"guidance": "none", "reward": None}, "reward_prompts: expected None without a reward"),
    ],
    ids=str,
)
def test_prompts_for_the_reward_that_are_none(pair, prompts, options, message):
    denoiser, reward = pair
    options = {"reward": reward, **options}
    with pytest.raises(ValueError, match=message):
        generate("the", denoiser, reward_prompts=prompts, **SMALL, **options)


# ----------------------------------------------------------------------------------------- arguments of templates

THINKING = "{% if enable_thinking %}think : {% endif %}" + tiny.CHAT
NAMED = {"default": tiny.CHAT, "short": "{% for m in messages %}{{ m.content }} {{ date_string }}{% endfor %}"}


def rendered(template, options, prompt="the"):
    tok = tiny.tokenizer(chat=template)
    denoiser = entrgi.MaskedLM(tiny.denoiser().model, tok, chat_template_kwargs=options)
    return tok.decode(denoiser.encode(prompt).body)


def test_template_arguments_reach_the_template():
    assert rendered(THINKING, None).startswith("user :")
    assert rendered(THINKING, {"enable_thinking": False}).startswith("user :")
    # "think" is no word of this vocabulary
    assert rendered(THINKING, {"enable_thinking": True}).startswith("[UNK] : user :")
    assert rendered(NAMED, {"chat_template": "default"}).startswith("user :")
    assert rendered(NAMED, {"chat_template": "short", "date_string": "w3"}) == "the w3"
    assert rendered(None, {"chat_template": NAMED["short"], "date_string": "w3"}) == "the w3"
    assert rendered(tiny.CHAT, {"chat_template": NAMED["short"]}) == "the"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (THINKING, {"enable_thinkin": True}, "'enable_thinkin', which the chat template does not read"),
        (tiny.CHAT, {"enable_thinking": True}, "'enable_thinking', which the chat template does not read"),
        (
            tiny.CHAT,
            {"chat_template": "short"},
            "chat_template is 'short', expected a template or the name of one: def",
        ),
        (NAMED, {"chat_template": "tool_use"}, "chat_template is 'tool_use', .* default, short"),
        (None, {"chat_template": "default"}, "the tokenizer has none"),
        (tiny.CHAT, {"chat_template": 3}, "chat_template is 3"),
        (tiny.CHAT, {"tools": []}, "'tools', which the chat template does not read"),
        (tiny.CHAT, {"tokenize": True}, "'tokenize', which is not the caller's to choose"),
        (tiny.CHAT, {"add_generation_prompt": False}, "not the caller's to choose"),
        (tiny.CHAT, "enable_thinking", "chat_template_kwargs is 'enable_thinking', expected a dict by name"),
        (tiny.CHAT, {3: 4}, "expected a dict by name"),
    ],
    ids=str,
)
def test_template_arguments_that_nobody_reads(template, options, message):
    tok = tiny.tokenizer(chat=template)
    with pytest.raises(ValueError, match=rf"^reward: .*{message}"):
        check_template_options("reward", tok, options)
    with pytest.raises(ValueError, match=rf"^denoiser: .*{message}"):
        entrgi.MaskedLM(tiny.denoiser().model, tok, chat_template_kwargs=options)


def test_a_template_that_fails_names_the_prompt():
    broken = "{% for m in messages %}{{ m.content.missing() }}{% endfor %}"
    with pytest.raises(ValueError, match=r"the chat template (refuses|cannot render) 'the'"):
        encode_prompt(tiny.tokenizer(chat=broken), "the")


def test_loaders_hand_template_arguments_on(tmp_path):
    template = official.CHATML + "{% if not enable_thinking %}<|im_start|>{% endif %}"
    folder = official.write_checkpoint(tmp_path, official.DREAM, official.dream_weights(official.DREAM))
    tok = entrgi.load_denoiser(folder).tokenizer
    tok.chat_template = template
    tok.save_pretrained(folder)
    closed, thinking = (
        entrgi.load_denoiser(folder, chat_template_kwargs={"enable_thinking": value}).encode("a").body
        for value in (False, True)
    )
    assert closed == [*thinking, official.IM_START]
