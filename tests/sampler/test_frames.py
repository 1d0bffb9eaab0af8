"""How far it is from `generate` to where the work is done: few functions, each with a meaning of its own."""

import sys

import torch

from entrgi import generate
from entrgi_ext import ops
from support import tiny

OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 4, "steps": 4, "seed": 0}


def frames_below(package: str, stop: str) -> list[str]:
    """Functions of ``package`` on the stack, innermost first, up to the one called ``stop``."""
    names, frame = [], sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            names.append(frame.f_code.co_name)
            if names[-1] == stop:
                return names
        frame = frame.f_back
    raise AssertionError(f"{stop} is not on the stack")


def test_an_operator_is_six_frames_from_generate(monkeypatch):
    paths, operator = [], ops.adam_step_

    def watched(*arguments, **options):
        paths.append(frames_below("entrgi", "generate"))
        return operator(*arguments, **options)

    monkeypatch.setattr(ops, "adam_step_", watched)
    generate("the movie", tiny.denoiser(), tiny.qwen3_reward(), **OPTIONS)
    assert {tuple(reversed(path)) for path in paths} == {("generate", "_run", "advance", "guide", "optimize_logits")}
    # The sixth is the operator's own.


def test_a_reward_is_five_frames_from_guidance():
    paths = []
    reward = tiny.qwen3_reward()
    reward.model.base_model.register_forward_pre_hook(
        lambda *_: paths.append(frames_below("entrgi", "optimize_logits")) if torch.is_grad_enabled() else None
    )
    generate("the movie", tiny.denoiser(), reward, **OPTIONS)
    assert paths
    assert max(len(path) - 1 for path in paths) <= 5
