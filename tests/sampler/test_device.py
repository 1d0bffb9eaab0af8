"""What only a GPU can show; skipped elsewhere."""

import pytest
import torch

import entrgi.sampler
from entrgi import generate
from support import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["the movie", "w3 was good w4"]
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 6, "steps": 6, "seed": 1}


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("guidance", ["entrgi", "expectation", "gumbel", "none"])
def test_no_step_waits_for_the_device(monkeypatch, kind, guidance):
    denoiser = tiny.denoiser(device="cuda")
    reward = tiny.bert_reward(device="cuda") if kind == "bert" else tiny.qwen3_reward(device="cuda")
    expected = generate(PROMPTS, denoiser, reward, guidance=guidance, **OPTIONS)  # libraries warm up
    advance = entrgi.sampler.advance

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return advance(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(entrgi.sampler, "advance", watched)
    assert torch.equal(generate(PROMPTS, denoiser, reward, guidance=guidance, **OPTIONS).sequences, expected.sequences)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_graphs(kind):
    denoiser = tiny.denoiser(device="cuda")
    reward = tiny.bert_reward(device="cuda") if kind == "bert" else tiny.qwen3_reward(device="cuda")
    plain = generate(PROMPTS, denoiser, reward, row_bucket=8, **OPTIONS)
    graphed = generate(PROMPTS, denoiser, reward, row_bucket=8, cuda_graphs=True, **OPTIONS)
    assert torch.equal(plain.sequences, graphed.sequences)
    assert plain.history.reward == graphed.history.reward


def test_same_draws_as_on_the_cpu():
    """The first differing token, if any, is a draw within rounding; with fp32 models of this size there is none."""
    on_cpu = generate(PROMPTS, tiny.denoiser(), tiny.bert_reward(), **OPTIONS)
    on_cuda = generate(PROMPTS, tiny.denoiser(device="cuda"), tiny.bert_reward(device="cuda"), **OPTIONS)
    assert torch.equal(on_cpu.sequences, on_cuda.sequences)
