"""A trajectory depends on its own seed and prompt, and on nothing it shares a batch with."""

import pytest
import torch

from entrgi import SamplerConfig, generate
from entrgi.config import GUIDANCE
from entrgi.generation import derive_seeds
from support import tiny

RAGGED = ["the", "w1 w2 w3 w4 w5 w6 w7", "movie was good", "w9 w8", "bad w40 w41 w42"]


def config(**options):
    return SamplerConfig(**{"num_return_sequences": 2, "max_new_tokens": 5, "steps": 5, **options})


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_ragged_batch_equals_single_runs(guidance, kind):
    denoiser = tiny.denoiser(torch.float64)
    reward = tiny.bert_reward(torch.float64) if kind == "bert" else tiny.qwen3_reward(torch.float64)
    options = config(guidance=guidance, alg_temp=0.3)
    seeds = derive_seeds(4, 5, 2)
    together = generate(RAGGED, denoiser, reward, options, trajectory_seeds=seeds)
    for b, prompt in enumerate(RAGGED):
        alone = generate(prompt, denoiser, reward, options, trajectory_seeds=seeds[b : b + 1])
        assert alone.texts[0] == together.texts[b]
        width = alone.sequences.shape[-1]
        assert torch.equal(alone.sequences[0], together.sequences[b, :, :width])
        assert (together.sequences[b, :, width:] == 0).all()
        torch.testing.assert_close(alone.rewards[0], together.rewards[b], rtol=1e-4, atol=1e-5)


def test_trajectories_that_wait_or_have_finished_change_nothing():
    """Different numbers of masks: their schedules commit in different steps."""
    denoiser, reward = tiny.denoiser(torch.float64), tiny.bert_reward(torch.float64)
    options = config(infill=True, max_new_tokens=0, steps=6)
    prompts = ["the [MASK] was", "[MASK] [MASK] w3 [MASK] [MASK] [MASK] [MASK] w5", "w1 [MASK] [MASK]"]
    seeds = derive_seeds(1, 3, 2)
    together = generate(prompts, denoiser, reward, options, trajectory_seeds=seeds)
    assert 2 in together.history.committed, "some step is left to one prompt alone"
    for b, prompt in enumerate(prompts):
        alone = generate(prompt, denoiser, reward, options, trajectory_seeds=seeds[b : b + 1])
        assert alone.texts[0] == together.texts[b]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_same_bits(dtype):
    denoiser, reward = tiny.denoiser(dtype), tiny.bert_reward(dtype)
    first = generate(RAGGED, denoiser, reward, config(), seed=12)
    second = generate(RAGGED, denoiser, reward, config(), seed=12)
    other = generate(RAGGED, denoiser, reward, config(), seed=13)
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.rewards, second.rewards)
    assert first.history.reward == second.history.reward
    assert not torch.equal(first.sequences, other.sequences)


def test_seeds():
    """By prompt and copy, so more copies leave the first ones as they were."""
    few, many = derive_seeds(7, 2, 2), derive_seeds(7, 3, 5)
    assert torch.equal(few, many[:2, :2])
    assert len(set(many.flatten().tolist())) == 15
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    options = config(guidance="none")
    a = generate("the", denoiser, reward, options, generator=torch.Generator().manual_seed(3))
    b = generate("the", denoiser, reward, options, generator=torch.Generator().manual_seed(3))
    c = generate("the", denoiser, reward, options, trajectory_seeds=a.seeds)
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.sequences, c.sequences)
    torch.manual_seed(1)
    d = generate("the", denoiser, reward, options)
    torch.manual_seed(1)
    assert torch.equal(generate("the", denoiser, reward, options).seeds, d.seeds)


def test_one_trajectory():
    options = config(num_return_sequences=1, max_new_tokens=1, steps=1)
    output = generate("the", tiny.denoiser(), tiny.bert_reward(), options, seed=0)
    assert output.sequences.shape == (1, 1, 4)
    assert len(output.responses[0][0].split()) == 1
    assert torch.equal(output.top1, output.avg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_dtype(dtype):
    """z may be kept in another dtype than the denoiser's."""
    output = generate("the", tiny.denoiser(), tiny.bert_reward(), config(logits_dtype=dtype), seed=2)
    default = generate("the", tiny.denoiser(), tiny.bert_reward(), config(), seed=2)
    assert (output.history.reward == default.history.reward) == (dtype == torch.float32)


def test_gradient_mode_of_the_caller_changes_nothing():
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    expected = generate("the", denoiser, reward, config(), seed=2)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(generate("the", denoiser, reward, config(), seed=2).sequences, expected.sequences)
