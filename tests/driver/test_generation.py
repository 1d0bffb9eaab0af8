"""Whole generations, token for token, against the transcription of the method in ``method.py``."""

import method
import pytest
import tiny
import torch

from entrgi import SamplerConfig, generate
from entrgi.config import ALGORITHMS, GUIDANCE

SEEDS = torch.tensor([[3, -(2**40)], [5, 2**61]])
PROMPTS = ["the movie", "w3 was"]


def tokens_of_the_method(denoiser, reward, config, prompts, seeds):
    """Every trajectory by itself, through full forward passes of the models."""
    pad = denoiser.tokenizer.pad_token_id
    options = method.Options(
        steps=config.steps,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        alg=config.alg,
        alg_temp=config.alg_temp,
        guidance=config.guidance,
        guidance_steps=config.guidance_steps,
        guidance_lr=config.guidance_lr,
        reward_scale=config.reward_scale,
        filtered_entropy=config.guidance == "none" if config.entropy_rule == "auto" else None,
        deprioritize_eos=config.deprioritize_eos,
        pad=pad,
    )
    if config.entropy_rule != "auto":
        options.filtered_entropy = config.entropy_rule == "filtered"
    forbidden = torch.arange(tiny.LOGITS_WIDTH) >= len(tiny.WORDS)
    forbidden[options.mask] = True
    forbidden[3] |= config.infill  # an end of sequence in a hole would cut off the text behind it
    embedding = reward.weight.clone()
    embedding[len(tiny.WORDS) :] = embedding[1]  # ids without a token read as [UNK]

    def logits_of(tokens):
        with torch.no_grad():
            return denoiser.model(input_ids=torch.tensor([tokens])).logits[0]

    def reward_model(embeds, mask):
        return reward.model(inputs_embeds=embeds[None], attention_mask=mask[None].long()).logits[0, 0]

    result = []
    for prompt, row in zip(prompts, seeds.tolist(), strict=True):
        body = [tiny.WORDS.index(word) for word in prompt.split()]
        start = [2, *body, *[4] * config.max_new_tokens, 3]
        first = start.index(4)
        window = (first, len(start) - 1)
        for seed in row:
            result.append(
                method.generate(
                    start,
                    seed,
                    window,
                    options,
                    logits_of,
                    embedding,
                    start[:first],
                    [3],
                    reward_model,
                    forbidden,
                )
            )
    return result


def check(dtype, prompts=PROMPTS, tok=None, eos_bias=0.0, **options):
    config = SamplerConfig(**{"num_return_sequences": 2, "max_new_tokens": 5, "steps": 4, **options})
    denoiser, reward = tiny.denoiser(dtype, tok), tiny.bert_reward(dtype, tok)
    with torch.no_grad():
        denoiser.model.get_output_embeddings().bias[3] += eos_bias
    output = generate(prompts, denoiser, reward, config, trajectory_seeds=SEEDS[: len(prompts)])
    expected = tokens_of_the_method(denoiser, reward, config, prompts, SEEDS[: len(prompts)])
    got = output.sequences.flatten(0, 1).tolist()
    for row, tokens in zip(got, expected, strict=True):
        assert row[: len(tokens)] == tokens
    return output


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_fp64(guidance, alg):
    check(torch.float64, guidance=guidance, alg=alg)


@pytest.mark.parametrize(
    ("guidance", "alg"), [*((g, "entropy") for g in GUIDANCE), *(("entrgi", a) for a in ALGORITHMS[1:])]
)
def test_fp32(guidance, alg):
    check(torch.float32, guidance=guidance, alg=alg)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": "none", "entropy_rule": "initial"},
        {"guidance": "entrgi", "entropy_rule": "filtered"},
        {"top_k": 2, "top_p": 1.0},
        {"top_k": 3, "top_p": 0.5},
        {"top_p": 1.0, "temperature": 1.3},
        {"top_p": 0.0},
        {"alg_temp": 0.5},
        {"alg": "maskgit_plus", "alg_temp": 2.0, "guidance": "none"},
        {"guidance_steps": 1},
        {"guidance_steps": 5, "guidance_lr": 0.1, "guidance": "aps"},
        {"reward_scale": -1.0},
    ],
    ids=str,
)
def test_options(options):
    check(torch.float64, prompts=PROMPTS[:1], **options)


@pytest.mark.parametrize(("length", "steps"), [(1, 1), (1, 4), (3, 8), (7, 2), (6, 1)])
def test_lengths(length, steps):
    output = check(torch.float64, prompts=PROMPTS[:1], max_new_tokens=length, steps=steps)
    assert not (output.sequences == 4).any()


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_end_of_sequence_ranks_last(alg):
    """With a denoiser that often draws it the rule decides which positions are committed."""
    options = {"alg": alg, "eos_bias": 4.0, "max_new_tokens": 6, "steps": 3, "guidance_steps": 1}
    last = check(torch.float64, **options)
    free = check(torch.float64, deprioritize_eos=False, **options)
    assert not torch.equal(last.sequences, free.sequences)
    for b in range(2):
        for k in range(2):
            words = [tiny.WORDS[i] for i in free.sequences[b, k, 3:-1].tolist()]
            read = " ".join(words[: words.index("[SEP]")] if "[SEP]" in words else words)
            assert free.responses[b][k] == read.replace("[UNK] ", "").replace(" [UNK]", "")


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_padding_token_is_the_end_token(guidance):
    check(torch.float64, tok=tiny.tokenizer(pad="[SEP]"), guidance=guidance, deprioritize_eos=False)


def test_infill():
    """Masks inside the prompt, the response window from the first of them on, fixed words kept."""
    prompts = ["the [MASK] was [MASK] w3", "w1 w2 [MASK] w4"]
    output = check(torch.float64, prompts=prompts, eos_bias=8.0, infill=True, max_new_tokens=0, steps=3)
    for text in output.texts[0]:
        words = text.split()
        assert (words[0], words[-1]) == ("the", "w3")
    check(torch.float64, prompts=prompts, infill=True, max_new_tokens=2, steps=3)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_end_of_sequence_as_first_response_token(guidance):
    """Text after it is not read, in the relaxed input as well as in the score."""
    output = check(torch.float64, eos_bias=8.0, max_new_tokens=4, guidance=guidance)
    ended = [(b, k) for b in range(2) for k in range(2) if output.sequences[b, k, 3] == 3]
    assert ended
    for b, k in ended:
        assert output.responses[b][k] == ""
        assert output.texts[b][k] == PROMPTS[b]


def test_best_of_n_scores_the_decoded_text():
    output = check(torch.float32, guidance="none", num_return_sequences=2)
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
    output = check(torch.float32, max_new_tokens=6, steps=6)
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
