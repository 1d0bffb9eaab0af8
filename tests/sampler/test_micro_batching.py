"""Trajectories in smaller groups, rows padded to a bucket, prompts one by one: the same tokens and rewards."""

import pytest
import torch

from entrgi import generate, guidance
from entrgi.generation import derive_seeds
from support import tiny
from support.transcribe import tiny_models

RAGGED = ["the", "w1 w2 w3 w4 w5 w6 w7", "movie was good", "w9 w8", "bad w40 w41 w42"]
HOLES = ["the [MASK] was", "[MASK] [MASK] w3 [MASK] [MASK] [MASK]", "w1 [MASK] [MASK]", "[MASK]", "w5 w6 [MASK] w7"]

CASES = [
    {},
    {"guidance": "none", "alg": "maskgit_plus"},
    {"guidance": "aps", "alg_temp": 0.5},
    {"guidance": "gumbel", "optimizer": "sgd", "guidance_lr": 20.0},
    {"block_length": 2, "max_new_tokens": 6, "steps": 7},
    {"block_length": 3, "threshold": -2.2, "max_new_tokens": 6, "steps": 6},
    {"threshold": 0.3, "alg": "maskgit_plus", "max_new_tokens": 7, "steps": 7},
    {"threshold": -2.0, "guidance": "none", "max_new_tokens": 7, "steps": 7},
    {"alg": "origin", "max_new_tokens": 7, "steps": 6},
    {"alg": "origin", "block_length": 3, "max_new_tokens": 7, "steps": 6, "schedule": "uniform"},
    {"early_exit": True, "deprioritize_eos": False, "eos_bias": 4.0, "max_new_tokens": 7, "steps": 7},
    {"early_exit": True, "deprioritize_eos": False, "eos_bias": 4.0, "alg": "origin", "max_new_tokens": 7, "steps": 7},
    {"early_exit": True, "threshold": -1.0, "eos_bias": 4.0, "max_new_tokens": 7, "steps": 7, "block_length": 3},
    {"infill": True, "max_new_tokens": 0, "schedule": "rgrl", "steps": 6},
    {"infill": True, "max_new_tokens": 1, "block_length": 2, "steps": 5},
    {"infill": True, "max_new_tokens": 1, "threshold": -2.0, "steps": 7},
    {"best_of": 4},
    {"guidance_interval": 2},
]


def run(case, prompts=None, seeds=None, reward="bert", models=None, **options):
    case = {"max_new_tokens": 5, "steps": 5, "num_return_sequences": 2, "guidance_steps": 2, **case, **options}
    models = models or tiny_models(torch.float64, eos_bias=case.pop("eos_bias", 0.0), reward=reward)
    case.pop("eos_bias", None)
    prompts = prompts or prompts_of(case)
    if seeds is None:
        seeds = derive_seeds(4, len(prompts), case.get("best_of") or 2)
    return generate(prompts, *models, trajectory_seeds=seeds, **case)


def prompts_of(case):
    return HOLES if case.get("infill") else RAGGED


def assert_equal(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.seeds, expected.seeds)
    assert output.texts == expected.texts
    torch.testing.assert_close(output.rewards, expected.rewards, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.candidate_rewards, expected.candidate_rewards, rtol=1e-5, atol=1e-6)
    assert output.history.step == expected.history.step
    assert output.history.committed == expected.history.committed
    for name in ("reward", "weight"):
        for got, value in zip(getattr(output.history, name), getattr(expected.history, name), strict=True):
            assert (got is None) == (value is None)
            assert got == pytest.approx(value, rel=1e-5, abs=1e-6) if value is not None else True


def watch_rows(models):
    """The number of logits asked for in each call of the denoiser."""
    denoiser, rows = models[0], []
    plain = denoiser.logits

    def logits(tokens, attention_mask, positions):
        rows.append(len(positions))
        return plain(tokens, attention_mask, positions)

    denoiser.logits = logits
    return rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_max_rows(case):
    models = tiny_models(torch.float64, eos_bias=case.get("eos_bias", 0.0))
    rows = watch_rows(models)
    expected = run(case, models=models)
    whole, calls = max(rows), len(rows)
    limit = max(7, whole // 3)
    rows.clear()
    assert_equal(run(case, models=models, max_rows=limit), expected)
    assert max(rows) <= limit < whole
    assert len(rows) > calls


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_row_bucket(case):
    expected = run(case)
    assert_equal(run(case, row_bucket=8), expected)


@pytest.mark.parametrize("case", CASES[1::6], ids=str)
def test_bucket_and_max_rows(case):
    models = tiny_models(torch.float64, eos_bias=case.get("eos_bias", 0.0))
    expected, rows = run(case, models=models), watch_rows(models)
    assert_equal(run(case, models=models, row_bucket=4, max_rows=11), expected)
    assert max(rows) == 8, "padding counts, and two trajectories do not fit"


@pytest.mark.parametrize("guidance", ["entrgi", "gumbel", "none"])
def test_padding_reads_no_position_that_is_not_masked(guidance):
    """What a denoiser gives there may be anything."""
    options = {"guidance": guidance}
    expected = run(options)
    models = tiny_models(torch.float64)
    denoiser = models[0]
    plain = denoiser.logits

    def logits(tokens, attention_mask, positions):
        unmasked = tokens.flatten()[positions] != denoiser.mask_token_id
        return plain(tokens, attention_mask, positions).masked_fill(unmasked[:, None], torch.nan)

    denoiser.logits = logits
    assert_equal(run(options, models=models, row_bucket=8), expected)


def test_bucket_pads_the_logits():
    """Every number of rows that the vocabulary operators see is a multiple."""
    seen = []

    def optimize(logits, **options):
        seen.append(len(logits))
        return guidance.ascend(logits, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entrgi.sampler.ascend", optimize)
        run({}, row_bucket=16)
        assert seen
        assert all(rows % 16 == 0 for rows in seen)
        seen.clear()
        run({})
        assert any(rows % 16 for rows in seen)


@pytest.mark.parametrize(
    ("case", "reward"), [*((case, "bert") for case in CASES[4:]), *((case, "qwen3") for case in CASES[4:11:3])], ids=str
)
def test_ragged_batch_equals_single_runs(case, reward):
    prompts = prompts_of(case)
    seeds = derive_seeds(4, 5, case.get("best_of") or 2)
    together = run(case, prompts, seeds, reward)
    for b, prompt in enumerate(prompts):
        alone = run(case, [prompt], seeds[b : b + 1], reward)
        assert alone.texts[0] == together.texts[b]
        width = alone.sequences.shape[-1]
        assert torch.equal(alone.sequences[0], together.sequences[b, :, :width])
        assert (together.sequences[b, :, width:] == 0).all()
        assert torch.equal(alone.seeds[0], together.seeds[b])
        torch.testing.assert_close(alone.rewards[0], together.rewards[b], rtol=1e-4, atol=1e-5)


def test_max_rows_too_small(never_run):
    with pytest.raises(ValueError, match=r"max_rows.* 4\b"):
        generate("the", *never_run, max_new_tokens=5, steps=5, num_return_sequences=2, max_rows=4)


def test_max_rows_too_small_for_the_padding(never_run):
    with pytest.raises(ValueError, match=r"max_rows must be at least the 5 .*, 8 with row_bucket 8, got 7"):
        generate("the", *never_run, max_new_tokens=5, steps=5, max_rows=7, row_bucket=8)


def test_max_rows_that_one_of_the_prompts_exceeds(never_run):
    with pytest.raises(ValueError, match="max_rows"):
        generate(["[MASK] the", "[MASK] [MASK] [MASK]"], *never_run, infill=True, max_new_tokens=0, steps=5, max_rows=2)


@pytest.fixture
def never_run():
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()

    def never(*_args, **_kwargs):
        raise AssertionError("generation has started")

    denoiser.model.forward, reward.model.forward = never, never
    return denoiser, reward
