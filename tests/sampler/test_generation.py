"""Whole generations, token for token, against the transcription of the method in ``method.py``."""

import warnings

import pytest
import torch

import entrgi.generation
from entrgi import SamplerConfig, generate
from support import tiny
from support.transcribe import PROMPTS, check

GUIDANCE = ["entrgi", "aps", "expectation", "gumbel", "none"]
ALGORITHMS = ["entropy", "maskgit_plus", "topk_margin", "anchor", "origin"]


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_fp64(guidance, alg):
    check(torch.float64, PROMPTS, copies=1, guidance=guidance, alg=alg)


@pytest.mark.parametrize(
    ("guidance", "alg"), [*((g, "entropy") for g in GUIDANCE), *(("entrgi", a) for a in ALGORITHMS[1:])]
)
def test_fp32(guidance, alg):
    check(torch.float32, PROMPTS, copies=1, guidance=guidance, alg=alg)


@pytest.mark.parametrize("preset", ["paper", "rgrl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_reward_behind_a_chat_template(preset, dtype):
    check(dtype, PROMPTS, copies=1, preset=preset, reward="qwen3")


@pytest.mark.parametrize(
    ("options", "unlike"),
    [
        ({"guidance": "aps"}, {"guidance": "entrgi"}),
        ({"guidance": "expectation"}, {"guidance": "aps"}),
        ({"top_k": 2, "top_p": 1.0}, {"top_k": None}),
        ({"top_k": 3, "top_p": 0.5}, {"top_k": None, "top_p": 0.95}),
        ({"top_p": 1.0, "temperature": 1.3}, {"temperature": 0.7}),
        ({"top_p": 0.0}, {"top_p": 0.95}),
        ({"alg_temp": 0.5}, {"alg_temp": 0.0}),
        ({"alg": "maskgit_plus", "alg_temp": 2.0, "guidance": "none"}, {"alg_temp": 0.0}),
        ({"guidance_steps": 1}, {"guidance_steps": 3}),
        ({"guidance_steps": 5, "guidance_lr": 0.1, "guidance": "aps"}, {"guidance_lr": 0.5}),
        ({"reward_scale": -1.0}, {"reward_scale": 1.0}),
    ],
    ids=str,
)
def test_options(options, unlike):
    check(**options, unlike=unlike)


@pytest.mark.parametrize("alg", ALGORITHMS[:-1])
def test_end_of_sequence_ranks_last(alg):
    """With a denoiser that often draws it the rule decides which positions are committed."""
    options = {"alg": alg, "eos_bias": 4.0, "max_new_tokens": 6, "steps": 3, "guidance_steps": 1, "prompts": PROMPTS}
    last = check(torch.float64, **options)
    free = check(torch.float64, deprioritize_eos=False, **options)
    assert not torch.equal(last.sequences, free.sequences)
    for b in range(2):
        for k in range(2):
            words = [tiny.WORDS[i] for i in free.sequences[b, k, 3:-1].tolist()]
            read = " ".join(words[: words.index("[SEP]")] if "[SEP]" in words else words)
            assert free.responses[b][k] == read.replace("[UNK] ", "").replace(" [UNK]", "")


def test_infill():
    """Masks inside the prompt, the response window from the first of them on, fixed words kept."""
    prompts = ["the [MASK] was [MASK] w3", "w1 w2 [MASK] w4"]
    output = check(torch.float64, prompts=prompts, eos_bias=8.0, infill=True, max_new_tokens=0, steps=3)
    for text in output.texts[0]:
        words = text.split()
        assert (words[0], words[-1]) == ("the", "w3")
    check(torch.float64, prompts=prompts, infill=True, max_new_tokens=2, steps=3)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warnings")
class TestEdges:
    """What a generation may meet at its limits: the method's tokens, and not one warning."""

    @pytest.mark.parametrize(
        ("length", "steps"),
        [(1, 1), (1, 4), (3, 8), (7, 2), (6, 1)],
        ids=["L=1,T=1", "L=1,T>L", "T>L", "T<L", "T=1"],
    )
    @pytest.mark.parametrize(
        ("schedule", "alg"), [("paper", "entropy"), ("rgrl", "entropy"), ("paper", "origin"), ("uniform", "origin")]
    )
    def test_lengths(self, length, steps, schedule, alg):
        output = check(max_new_tokens=length, steps=steps, schedule=schedule, alg=alg, guidance_steps=2)
        assert sum(output.history.committed) == 2 * length
        assert output.history.step == sorted(set(output.history.step))
        assert set(output.history.step) <= set(range(steps))

    @pytest.mark.parametrize("guidance", GUIDANCE)
    def test_padding_token_is_the_end_token(self, guidance):
        tok = tiny.tokenizer(pad="[SEP]")
        check(prompts=PROMPTS, tok=tok, guidance=guidance, deprioritize_eos=False, eos_bias=3.0)

    @pytest.mark.parametrize("guidance", GUIDANCE)
    def test_end_of_sequence_as_first_response_token(self, guidance):
        """Text after it is not read, in the relaxed input as well as in the score."""
        output = check(prompts=PROMPTS, eos_bias=8.0, max_new_tokens=4, guidance=guidance)
        ended = [(b, k) for b in range(2) for k in range(2) if output.sequences[b, k, 3] == 3]
        assert ended
        for b, k in ended:
            assert output.responses[b][k] == ""
            assert output.texts[b][k] == PROMPTS[b]

    @pytest.mark.parametrize("guidance", ["entrgi", "none"])
    @pytest.mark.parametrize("options", [{"schedule": "uniform"}, {"threshold": -9.0}], ids=str)
    def test_response_that_is_committed_before_the_others(self, guidance, options):
        """One hole beside six: the first trajectories have nothing left to do for most of the steps."""
        prompts = ["the [MASK] was", "[MASK] [MASK] w3 [MASK] [MASK] [MASK] [MASK]"]
        check(prompts=prompts, infill=True, max_new_tokens=0, steps=6, guidance=guidance, **options)

    @pytest.mark.parametrize("preset", ["paper", "rgrl"])
    def test_one_copy(self, preset):
        output = check(copies=1, preset=preset)
        assert output.sequences.shape[:2] == (1, 1)
        assert torch.equal(output.top1, output.avg)


def test_best_of_n_scores_the_decoded_text():
    output = check(torch.float32, PROMPTS, guidance="none")
    reward = tiny.bert_reward()
    for b, prompt in enumerate(PROMPTS):
        for k in range(2):
            ids = [2, *[tiny.WORDS.index(word) for word in output.texts[b][k].split()], 3]
            assert output.texts[b][k].startswith(prompt)
            own = reward.model(input_ids=torch.tensor([ids])).logits[0, 0]
            torch.testing.assert_close(output.rewards[b, k], own, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.top1, output.rewards.max(dim=1).values)
    assert torch.equal(output.avg, output.rewards.mean(dim=1))
    assert output.history.reward == [None] * len(output.history.step)


def test_history():
    output = check(torch.float32, PROMPTS, max_new_tokens=6, steps=6)
    assert output.history.step == [1, 2, 3, 4, 5]
    assert output.history.committed == [4, 4, 4, 4, 8]
    assert all(0 < weight < 1 for weight in output.history.weight)
    assert set(output.timings) == {"denoise", "guide", "commit", "score", "total"}
    assert output.complete


def test_qwen3_reward_with_chat_template():
    """A causal reward behind a chat template, the denoiser plain: whole generation, fp32, seeds alone decide."""
    denoiser, reward = tiny.denoiser(), tiny.qwen3_reward()
    config = SamplerConfig(num_return_sequences=2, max_new_tokens=5, steps=5)
    first = generate(PROMPTS, denoiser, reward, config, seed=9)
    again = generate(PROMPTS, denoiser, reward, config, seed=9)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(first.rewards, again.rewards)
    for b, prompt in enumerate(PROMPTS):
        for k in range(2):
            text = f"user : {prompt} [SEP] assistant : {first.responses[b][k]} [SEP]"
            ids = torch.tensor([[tiny.WORDS.index(word) for word in text.split()]])
            own = reward.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            torch.testing.assert_close(first.rewards[b, k], own, rtol=1e-4, atol=1e-4)
            assert first.texts[b][k] == first.responses[b][k]


def test_forbidden_ids_travel_as_a_list_on_cuda_where_they_are_few():
    mask = torch.zeros(1024, dtype=torch.bool)
    mask[[7, 0, 1023, 512]] = True
    ids = entrgi.generation.for_draws(mask, torch.device("cuda"))
    assert ids.dtype == torch.int32
    assert ids.tolist() == [0, 7, 512, 1023]
    assert entrgi.generation.for_draws(mask, torch.device("cpu")) is mask
    mask[8] = True  # one more than one in 256
    assert entrgi.generation.for_draws(mask, torch.device("cuda")) is mask


def test_a_list_of_forbidden_ids_generates_the_same(monkeypatch):
    options = {"max_new_tokens": 6, "steps": 6, "seed": 3, "num_return_sequences": 2, "forbidden_ids": [9, 5]}
    expected = generate("the movie", tiny.denoiser(), tiny.bert_reward(), **options)
    lists = []

    def as_list(forbidden, _device):
        lists.append(forbidden.nonzero()[:, 0].int())
        return lists[-1]

    monkeypatch.setattr(entrgi.generation, "for_draws", as_list)
    got = generate("the movie", tiny.denoiser(), tiny.bert_reward(), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(lists) == 1


def test_a_denoiser_that_runs_in_inference_mode(monkeypatch):
    """Its logits are then guided outside, in place."""
    options = {"max_new_tokens": 5, "steps": 5, "seed": 3}
    expected = generate("the movie", tiny.denoiser(), tiny.bert_reward(), **options)
    denoiser = tiny.denoiser()
    logits = denoiser.logits

    def in_inference_mode(*args):
        with torch.inference_mode():
            result = logits(*args)
        assert result.is_inference()
        return result

    monkeypatch.setattr(denoiser, "logits", in_inference_mode)
    assert torch.equal(generate("the movie", denoiser, tiny.bert_reward(), **options).sequences, expected.sequences)
