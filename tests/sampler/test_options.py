"""Every option of the sampler, alone and together with others, token for token against the method.

``unlike`` gives options that must make another text: no test passes where an option is ignored.
"""

import pytest
import torch

from entrgi import generate
from support import tiny
from support.transcribe import (
    EOS,
    PROMPTS,
    SEEDS,
    check,
    final_reward,
    method_options,
    sample,
    text_read,
    tiny_models,
    trajectory,
    transcribed,
)

EIGHT = {"max_new_tokens": 8, "steps": 8}
ENDS = (EOS, *range(20, 60, 3))  # enough for some of them to be drawn
ENDING = {"eos_bias": 5.0, "deprioritize_eos": False, **EIGHT}
INFILL = {"prompts": ["the [MASK] was [MASK] [MASK] w3 [MASK]"], "infill": True, "max_new_tokens": 1}

ALONE = [
    ({"schedule": "rgrl", "max_new_tokens": 10}, {"schedule": "paper"}),
    ({"schedule": "rgrl", "max_new_tokens": 10}, {"schedule": "uniform"}),
    ({"schedule": "uniform", "max_new_tokens": 7}, {"schedule": "paper"}),
    ({"schedule": "rgrl", "max_new_tokens": 4, "steps": 8}, {"schedule": "uniform"}),
    ({"alg": "origin", "max_new_tokens": 8}, {"alg": "entropy"}),
    ({"alg": "origin", "max_new_tokens": 8, "schedule": "rgrl"}, {"alg": "entropy"}),
    ({"alg": "origin", "max_new_tokens": 9, "schedule": "uniform", "steps": 3}, {"alg": "entropy"}),
    ({"alg": "origin", "max_new_tokens": 5, "steps": 12}, {"alg": "entropy"}),
    ({"entropy_rule": "filtered", "max_new_tokens": 8}, {"entropy_rule": "auto"}),
    (
        {"entropy_rule": "initial", "guidance": "none", **EIGHT, "copies": 4},
        {"entropy_rule": "auto"},
    ),
    ({"block_length": 2, "max_new_tokens": 7, "steps": 6}, {"block_length": None}),
    ({"block_length": 1, "max_new_tokens": 5, "steps": 7}, {"block_length": None}),
    ({"block_length": 3, "max_new_tokens": 8, "steps": 11}, {"block_length": 4}),
    ({"threshold": -2.0, **EIGHT}, {"threshold": None}),
    ({"threshold": -2.0, **EIGHT, "guidance": "none"}, {"threshold": None}),
    ({"threshold": 0.3, "alg": "maskgit_plus", **EIGHT}, {"threshold": None}),
    ({"threshold": 0.15, "alg": "topk_margin", **EIGHT}, {"threshold": None}),
    ({"threshold": 5.0, "alg": "anchor", **EIGHT}, {"threshold": None}),
    ({"threshold": 0.0, "max_new_tokens": 8, "steps": 16}, {"threshold": None}),  # never reached: one a step
    ({"threshold": 0.0, "max_new_tokens": 10, "schedule": "rgrl"}, {"schedule": "uniform"}),
    ({**ENDING, "early_exit": True}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "guidance": "none"}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "prompts": ["the [SEP] movie"]}, {"early_exit": False}),
    ({"guidance_interval": 2, "steps": 5}, {"guidance_interval": 1}),
    ({"guidance_interval": 3, "steps": 5}, {"guidance_interval": 2}),
    ({"guidance_interval": (1, 3), "steps": 5}, {"guidance_interval": 1}),
    ({"guidance_interval": (0, 2), "steps": 5}, {"guidance_interval": (2, 5)}),
    ({"optimizer": "sgd", "guidance_lr": 20.0}, {"optimizer": "adam", "guidance_lr": 0.5}),
    ({"optimizer": "sgd", "guidance_lr": 20.0, "guidance_steps": 1}, {"optimizer": "adam"}),
    ({"optimizer": "sgd", "guidance_lr": 40.0, "guidance": "aps", "copies": 4}, {"guidance": "entrgi"}),
    ({"guidance": "gumbel"}, {"guidance": "entrgi"}),
    ({"guidance": "gumbel", "gumbel_temperature": 0.4}, {"gumbel_temperature": 1.0}),
    (
        {"guidance": "gumbel", "gumbel_temperature": 3.0, "temperature": 1.2, "copies": 4},
        {"guidance": "expectation", "gumbel_temperature": 1.0},
    ),
    ({"deprioritize_eos": False, "eos_bias": 4.0, "max_new_tokens": 6}, {"deprioritize_eos": True}),
    ({"temperature": 0, **EIGHT}, {"temperature": 1}),
    ({"temperature": 0, "guidance": "none", **EIGHT}, {"temperature": 1}),
    ({"temperature": 0, "alg": "maskgit_plus", "top_p": 0.8, **EIGHT}, {"alg": "entropy"}),
    ({"temperature": 0, "alg": "maskgit_plus", "schedule": "uniform", "guidance": "none", **EIGHT}, {"temperature": 1}),
    ({"temperature": 0, "alg": "topk_margin", "top_k": 3, **EIGHT}, {"alg": "entropy"}),
    ({"temperature": 0, "guidance": "expectation", **EIGHT}, {"guidance": "entrgi"}),
    ({"alg": "random", **EIGHT}, {"alg": "entropy"}),
    ({"alg": "random", "guidance": "none", "temperature": 0, "schedule": "uniform", **EIGHT}, {"alg": "maskgit_plus"}),
    ({"alg": "random", "max_new_tokens": 9, "schedule": "uniform", "steps": 3}, {"alg": "origin"}),
    ({"alg": "random", "eos_bias": 4.0, **EIGHT}, {"deprioritize_eos": False}),
    ({"ends": ENDS, "end_tokens": "all", **EIGHT}, {"end_tokens": "eos"}),
    ({"ends": ENDS, "end_tokens": "all", "guidance": "none", **EIGHT, "copies": 4}, {"end_tokens": "eos"}),
    ({"ends": ENDS, "end_tokens": "all", "deprioritize_eos": False, **EIGHT, "copies": 4}, {"end_tokens": "eos"}),
    ({"ends": ENDS, "early_exit": True, **EIGHT, "copies": 4}, {"ends": (EOS,)}),
    ({"ends": ENDS, **ENDING, "early_exit": True, "end_tokens": "all", "copies": 4}, {"early_exit": False}),
]

TOGETHER = [
    ({"block_length": 3, "threshold": -2.2, **EIGHT}, {"block_length": None}),
    ({"block_length": 3, "threshold": -2.2, **EIGHT}, {"threshold": None}),
    ({"block_length": 3, "alg": "origin", **EIGHT}, {"block_length": None}),
    ({"block_length": 4, "alg": "origin", "schedule": "uniform", "max_new_tokens": 8}, {"alg": "entropy"}),
    ({"block_length": 4, "alg_temp": 2.0, **EIGHT}, {"alg_temp": 0.0}),
    ({"block_length": 4, "schedule": "rgrl", "max_new_tokens": 10, "steps": 9}, {"schedule": "paper"}),
    ({"block_length": 2, "preset": "rgrl", "max_new_tokens": 7, "steps": 8}, {"block_length": None}),
    (
        {"threshold": 0.4, "alg": "maskgit_plus", "guidance": "aps", **EIGHT},
        {"guidance": "none"},
    ),
    ({"threshold": -2.0, "guidance_interval": 2, **EIGHT}, {"guidance_interval": 1}),
    ({"threshold": -3.0, "eos_bias": 4.0, **EIGHT}, {"deprioritize_eos": False}),
    ({"guidance_interval": 2, "alg": "maskgit_plus", "steps": 5}, {"guidance_interval": 1}),
    ({"guidance_interval": 2, "alg": "origin", "max_new_tokens": 8}, {"guidance_interval": 1}),
    ({"guidance_interval": (1, 4), "alg": "entropy", "entropy_rule": "filtered", "steps": 5}, {"entropy_rule": "auto"}),
    ({"guidance_interval": 2, "block_length": 2, "max_new_tokens": 6, "steps": 7}, {"guidance_interval": 1}),
    ({**ENDING, "early_exit": True, "block_length": 3}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "alg": "origin", "eos_bias": 3.0, "copies": 4}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "threshold": -0.7, "copies": 4}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "deprioritize_eos": True, "copies": 4}, {"early_exit": False}),
    ({**ENDING, "early_exit": True, "alg": "maskgit_plus", "preset": "rgrl"}, {"early_exit": False}),
    ({**INFILL, "block_length": 2, "steps": 4}, {"block_length": None}),
    ({**INFILL, "block_length": 2, "threshold": -2.0, "steps": 5}, {"threshold": None}),
    ({**INFILL, "alg": "origin", "steps": 4}, {"alg": "entropy"}),
    ({"guidance": "gumbel", "optimizer": "sgd", "guidance_lr": 20.0}, {"optimizer": "adam", "guidance_lr": 0.5}),
    ({"guidance": "gumbel", "guidance_interval": 2, "alg": "topk_margin", "steps": 6}, {"guidance_interval": 1}),
    (
        {"guidance": "gumbel", "block_length": 2, "threshold": -2.2, "max_new_tokens": 6, "steps": 6},
        {"threshold": None},
    ),
    ({"temperature": 0, "block_length": 3, "alg": "random", **EIGHT}, {"block_length": None}),
    ({"temperature": 0, "threshold": 0.5, "alg": "maskgit_plus", **EIGHT}, {"threshold": None}),
    ({"temperature": 0, "alg_temp": 0.5, "alg": "maskgit_plus", **EIGHT}, {"alg_temp": 0}),
    ({"ends": ENDS, "end_tokens": "all", "threshold": -3.2, **EIGHT, "copies": 4}, {"end_tokens": "eos"}),
    ({"ends": ENDS, "end_tokens": "all", "alg_temp": 1.0, **EIGHT}, {"end_tokens": "eos"}),
    ({"ends": ENDS, "end_tokens": "all", "alg": "origin", **EIGHT, "copies": 4}, {"alg": "entropy"}),
    ({"optimizer": "sgd", "guidance_lr": 20.0, "reward_scale": -0.5, "alg": "anchor"}, {"reward_scale": 1.0}),
    ({"guidance": "none", "block_length": 2, "threshold": -1.5, **EIGHT}, {"threshold": None}),
    ({"guidance": "none", "block_length": 3, "alg": "topk_margin", "max_new_tokens": 8}, {"block_length": None}),
]


@pytest.mark.parametrize(("options", "unlike"), ALONE, ids=str)
def test_fp64(options, unlike):
    check(torch.float64, **options, unlike=unlike)


@pytest.mark.parametrize(("options", "unlike"), TOGETHER, ids=str)
def test_together_fp64(options, unlike):
    check(torch.float64, **options, unlike=unlike)


@pytest.mark.parametrize(("options", "_unlike"), [*ALONE[::3], *TOGETHER[::4]], ids=str)
def test_fp32(options, _unlike):
    check(torch.float32, **options)


@pytest.mark.parametrize("options", [TOGETHER[0][0], TOGETHER[2][0], {**ENDING, "early_exit": True}], ids=str)
def test_causal_reward(options):
    check(torch.float64, reward="qwen3", **options)


@pytest.mark.parametrize("guidance", ["entrgi", "none"])
def test_one_block_is_no_block(guidance):
    options = {"guidance": guidance, "max_new_tokens": 6, "steps": 5}
    plain = sample(**options)
    for length in (6, 7):
        assert torch.equal(sample(**options, block_length=length).sequences, plain.sequences)


def test_origin_knows_no_rule_for_the_end_of_sequence():
    options = {"alg": "origin", "eos_bias": 4.0, "max_new_tokens": 8}
    output = check(**options, deprioritize_eos=True)
    assert (output.sequences[:, :, 3:-1] == EOS).any()
    assert torch.equal(output.sequences, sample(**options, deprioritize_eos=False).sequences)


@pytest.mark.parametrize("interval", [(0, 4), (0, 99)])
def test_interval_that_holds_every_step(interval):
    assert torch.equal(sample(guidance_interval=interval).sequences, sample().sequences)


@pytest.mark.parametrize("interval", [(4, 9), (0, 1)])
def test_interval_that_holds_no_step(interval):
    """Steps 0 to 3; the paper schedule commits nothing in step 0 of four, which is therefore skipped."""
    options = {"max_new_tokens": 4, "steps": 4}
    output = sample(**options, guidance_interval=interval)
    unguided = sample(**options, guidance="none", entropy_rule="initial")
    assert torch.equal(output.sequences, unguided.sequences)
    assert output.history.reward == [None] * len(output.history.step)


def test_threshold_shortens_the_generation():
    options = {**EIGHT, "alg": "maskgit_plus"}
    everything = sample(**options, threshold=0.0, deprioritize_eos=False)
    assert everything.history.step == [0]
    assert everything.history.committed == [16]
    never = sample(**options, threshold=1.5)
    assert never.history.step == list(range(8)), "never less than one token a step"
    part = sample(**options, threshold=0.3)
    assert 1 < len(part.history.step) < 8
    assert part.history.step == list(range(len(part.history.step)))


def test_threshold_hands_over_to_the_next_block():
    """Steps that a block did not need are not made, and the next block starts at once."""
    output = sample(
        max_new_tokens=8, steps=8, block_length=4, alg="maskgit_plus", threshold=0.0, deprioritize_eos=False
    )
    assert output.history.step == [0, 1]
    assert output.history.committed == [8, 8]


def test_early_exit_fills_with_the_end_of_sequence():
    output = sample(**ENDING, early_exit=True, copies=4)
    full = sample(**ENDING, early_exit=False, copies=4)
    ended = 0
    for early, late in zip(output.sequences[0, :, 3:-1].tolist(), full.sequences[0, :, 3:-1].tolist(), strict=True):
        if EOS in early:
            first = early.index(EOS)
            assert early[:first] == late[:first]
            ended += early != late and set(early[first:]) == {EOS}
    assert ended
    assert output.responses == full.responses, "what is behind the end is not read"
    torch.testing.assert_close(output.rewards, full.rewards)


def test_early_exit_of_all_ends_the_generation():
    output = sample(**{**ENDING, "eos_bias": 30.0}, early_exit=True)
    assert len(output.history.step) < 7
    assert output.complete


@pytest.mark.parametrize(("guidance", "keep"), [("entrgi", 2), ("none", 1), ("none", 4)])
def test_best_of(guidance, keep):
    """N by the method, the best of them by the score of their decoded text, best first."""
    models = tiny_models(torch.float64)
    options = {"guidance": guidance, "steps": 4}
    output = generate(
        PROMPTS,
        *models,
        trajectory_seeds=SEEDS,
        num_return_sequences=keep,
        best_of=4,
        max_new_tokens=5,
        **options,
    )
    everything = transcribed(*models, PROMPTS, SEEDS, method_options(**options), 5)
    assert output.candidate_rewards.shape == (2, 4)
    assert output.sequences.shape[:2] == (2, keep)
    for b, prompt in enumerate(PROMPTS):
        window = trajectory(prompt, 5, False)[1]
        tokens = [everything[4 * b + n][0] for n in range(4)]
        rewards = [final_reward(models[1], text_read(prompt, row, window)) for row in tokens]
        torch.testing.assert_close(output.candidate_rewards[b].double(), torch.tensor(rewards).double())
        order = sorted(range(4), key=lambda n: -rewards[n])[:keep]
        assert order != list(range(keep)) or keep == 1
        for k, n in enumerate(order):
            assert output.sequences[b, k, : len(tokens[n])].tolist() == tokens[n]
            assert output.seeds[b, k] == SEEDS[b, n]
            assert output.texts[b][k] == text_read(prompt, tokens[n], window)
            assert output.rewards[b, k].item() == pytest.approx(rewards[n], rel=1e-5)
    assert torch.equal(output.top1, output.rewards[:, 0])


def test_ids_without_a_token_are_never_drawn():
    output = check(torch.float64, PROMPTS, top_p=1.0, temperature=3.0, guidance="none")
    assert (output.sequences < len(tiny.WORDS)).all()
