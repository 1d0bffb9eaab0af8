"""Both presets as the decision lists of the method have them, over whole generations."""

import pytest
import torch

from entrgi import preset
from support import preset_loops
from support.transcribe import PROMPTS, check

LOOPS = {"paper": preset_loops.paper, "rgrl": preset_loops.rgrl}

# One row of the lists at a time: the option, its value under the other reading, and the case that shows it.
ROWS = {
    "paper": [
        ("schedule", "rgrl", {"max_new_tokens": 10, "steps": 4}),
        ("schedule", "uniform", {"max_new_tokens": 10, "steps": 4}),
        ("entropy_rule", "filtered", {}),
        ("deprioritize_eos", False, {"eos_bias": 3.0}),
        ("guidance_steps", 1, {}),
        ("guidance_lr", 0.1, {}),
        ("temperature", 0.9, {}),
        ("top_p", 1.0, {"copies": 4}),
        ("top_k", 2, {"copies": 4}),
        ("alg", "maskgit_plus", {}),
        ("alg", "topk_margin", {}),
        ("alg", "anchor", {}),
        ("alg", "origin", {}),
        ("alg_temp", 1.0, {}),
        ("guidance", "aps", {}),
        ("guidance", "expectation", {}),
        ("guidance", "gumbel", {}),
        ("guidance", "none", {}),
        ("optimizer", "sgd", {}),
        ("guidance_interval", 2, {}),
        ("block_length", 3, {}),
        ("threshold", -2.5, {}),
        ("early_exit", True, {"eos_bias": 5.0, "copies": 4}),
        ("reward_scale", -1.0, {}),
    ],
    "rgrl": [
        ("schedule", "paper", {"max_new_tokens": 10, "steps": 4}),
        ("schedule", "uniform", {"max_new_tokens": 10, "steps": 4}),
        ("entropy_rule", "initial", {}),
        ("deprioritize_eos", True, {"eos_bias": 3.0}),
        ("guidance_steps", 3, {}),
        ("guidance_lr", 0.1, {}),
        ("temperature", 0.7, {}),
        ("top_p", 0.5, {"copies": 4}),
        ("top_k", 3, {"copies": 4}),
        ("top_k", None, {"logit_scale": 0.1}),
        ("alg", "maskgit_plus", {}),
        ("guidance", "none", {}),
    ],
}


@pytest.mark.parametrize("name", ["paper", "rgrl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("length", "steps", "reward"),
    [(12, 12, "bert"), (10, 4, "bert"), (4, 8, "bert"), (7, 7, "qwen3")],
    ids=["L=T", "T<L", "T>L", "causal reward"],
)
def test_whole_generation(name, dtype, length, steps, reward):
    """All T steps, at the presets' L = T and beside it, against a plain loop with nothing in it but the preset."""
    check(dtype, PROMPTS, preset=name, walk=LOOPS[name], max_new_tokens=length, steps=steps, reward=reward)


@pytest.mark.parametrize("name", ["paper", "rgrl"])
def test_whole_generation_with_ends_of_sequence(name):
    """Where the denoiser likes to end the text, the reward's mask and the rule for the end matter."""
    check(torch.float64, PROMPTS, preset=name, walk=LOOPS[name], max_new_tokens=8, steps=8, eos_bias=4.0)


@pytest.mark.parametrize("name", ["paper", "rgrl"])
def test_whole_generation_of_an_unsure_denoiser(name):
    """Nearly even logits: some draws fall beyond the 50th id, which only one of the presets allows."""
    check(torch.float64, PROMPTS, preset=name, walk=LOOPS[name], max_new_tokens=8, steps=8, logit_scale=0.1)


@pytest.mark.parametrize(
    ("name", "option", "value", "case"),
    [(name, *row) for name, rows in ROWS.items() for row in rows],
    ids=lambda x: str(x) if isinstance(x, str) else f"{x}",
)
def test_row(name, option, value, case):
    """Flipping this option alone gives the method's other text."""
    own = getattr(preset(name), option)
    assert own != value
    check(
        torch.float64,
        **{"preset": name, "max_new_tokens": 8, "steps": 8, option: value, **case},
        unlike={option: own},
    )


def test_values():
    config = preset("paper")
    assert (config.num_return_sequences, config.steps, config.max_new_tokens) == (4, 128, 128)
    assert (config.guidance_steps, config.guidance_lr, config.temperature, config.top_p) == (3, 0.5, 0.7, 0.95)
    assert (config.top_k, config.alg, config.guidance, config.logits_dtype) == (None, "entropy", "entrgi", None)
    assert (config.schedule, config.entropy_rule, config.deprioritize_eos) == ("paper", "auto", True)
    assert (config.optimizer, config.guidance_interval, config.alg_temp) == ("adam", 1, 0.0)
    assert (config.block_length, config.threshold, config.early_exit, config.best_of) == (None, None, False, None)
    other = preset("rgrl")
    changed = {
        "guidance_steps": 1,
        "temperature": 0.9,
        "top_k": 50,
        "schedule": "rgrl",
        "entropy_rule": "filtered",
        "deprioritize_eos": False,
    }
    for field in vars(config):
        assert getattr(other, field) == changed.get(field, getattr(config, field)), field


def test_best_of_n_uses_the_filtered_rule():
    """M = 0 and confidence from the filtered distribution; an option selects the guided loop's rule."""
    options = {"guidance": "none", "max_new_tokens": 8, "steps": 8, "copies": 4}
    check(torch.float64, **options, entropy_rule="filtered", unlike={"entropy_rule": "initial"})
    by_default = check(torch.float64, **options)
    assert torch.equal(by_default.sequences, check(torch.float64, **options, entropy_rule="filtered").sequences)
