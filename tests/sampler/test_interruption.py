"""What a user gets when a generation does not reach its end."""

import threading

import pytest
import torch

from entrgi import SamplerConfig, generate, sampler
from entrgi.guidance import optimize_logits
from support import tiny

CONFIG = SamplerConfig(num_return_sequences=2, max_new_tokens=5, steps=5)


def test_interrupt_carries_what_is_done():
    states = []

    def press(state):
        states.append(state)
        if len(states) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        generate(["the", "w1 w2"], tiny.denoiser(), tiny.bert_reward(), CONFIG, seed=1, callback_on_step_end=press)
    partial = caught.value.partial
    assert not partial.complete
    assert partial.rewards.isnan().all()
    assert partial.history.step == [1, 2]
    assert (partial.sequences == 4).sum() == 4 * (5 - 2)
    full = generate(["the", "w1 w2"], tiny.denoiser(), tiny.bert_reward(), CONFIG, seed=1)
    done = partial.sequences != 4
    assert torch.equal(partial.sequences[done], full.sequences[done])


def test_interrupt_inside_a_model():
    denoiser = tiny.denoiser()
    forward, calls = denoiser.model.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    denoiser.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt) as caught:
        generate("the", denoiser, tiny.bert_reward(), CONFIG, seed=1)
    assert caught.value.partial.history.committed == [2, 2]


class Recorder:
    """A streamer that notes what it gets, and fails where it is told to."""

    def __init__(self, fail=None):
        self.calls, self.fail = [], fail

    def put(self, value):
        self.calls.append("put")
        if self.fail == "put":
            raise RuntimeError("put failed")

    def end(self):
        self.calls.append("end")
        if self.fail == "end":
            raise RuntimeError("end failed")


def fails_in(place, error):
    """Models and options of a generation that ends with ``error`` at ``place``."""
    denoiser, reward, options = tiny.denoiser(), tiny.bert_reward(), {}
    calls = []

    def failing(*_args, **_options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return plain(*_args, **_options)

    if place == "denoiser":
        plain, denoiser.logits = denoiser.logits, failing
    elif place == "reward":
        plain, reward.model.forward = reward.model.forward, failing
    elif place == "callback":
        plain, options["callback_on_step_end"] = (lambda _state: None), failing
    else:

        def score(_completions):
            raise error

        reward.score = score
    return denoiser, reward, options


ERRORS = [RuntimeError("gone"), KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("out"), OSError(5, "io")]
ERRORS += [ValueError("no"), SystemExit(3), TypeError("x"), StopIteration(), GeneratorExit()]
ONE = SamplerConfig(num_return_sequences=1, max_new_tokens=5, steps=5)


@pytest.mark.parametrize("place", ["denoiser", "reward", "callback", "score"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_keeps_the_partial_output_and_ends_the_streamer(place, error):
    denoiser, reward, options = fails_in(place, error)
    streamer = Recorder()
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - each of ERRORS in turn
        generate("the", denoiser, reward, ONE, seed=1, streamer=streamer, **options)
    assert caught.value is error or caught.value.__cause__ is error
    partial = caught.value.partial
    assert not partial.complete
    assert partial.rewards.isnan().all()
    done = {"denoiser": [1], "callback": [1, 1], "score": [1] * 5}.get(place)
    if done is not None:
        assert sum(partial.history.committed) == sum(done)
        assert (partial.sequences == 4).sum() == 5 - sum(done)
    assert streamer.calls.count("end") == 1
    assert streamer.calls[-1] == "end"


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1.5},
        {"prompts": "the [MASK]"},
        {"prompts": "w1 " * 60},
        {"config": "fast"},
        {"colour": 1},
        {"steps": 0},
        {"num_return_sequences": 2},
        {"forbidden_ids": [10**6]},
        {"callback_on_step_end": 1},
        {"denoiser": None},
        {"reward": None},
    ],
    ids=str,
)
def test_errors_before_the_first_step_end_the_streamer(wrong):
    streamer = Recorder()
    arguments = {"prompts": "the", "denoiser": tiny.denoiser(), "reward": tiny.bert_reward(), "config": ONE, "seed": 1}
    with pytest.raises(ValueError, match=r"."):
        generate(**{**arguments, "streamer": streamer, **wrong})
    assert streamer.calls.count("end") == 1


@pytest.mark.parametrize("fail", ["put", "end"])
def test_streamers_that_fail_are_ended_once_and_heard(fail):
    streamer = Recorder(fail)
    with pytest.raises(RuntimeError, match=f"{fail} failed") as caught:
        generate("the", tiny.denoiser(), tiny.bert_reward(), ONE, seed=1, streamer=streamer)
    assert not caught.value.partial.complete
    assert streamer.calls.count("end") == 1


def test_an_error_is_not_hidden_by_the_streamer_or_by_the_partial_output(monkeypatch):
    denoiser, reward, _ = fails_in("denoiser", RuntimeError("gone"))

    def broken(*_args, **_options):
        raise RuntimeError("no partial output either")

    monkeypatch.setattr(sampler, "_finish", broken)
    with pytest.raises(RuntimeError, match="gone"):
        generate("the", denoiser, reward, ONE, seed=1, streamer=Recorder("end"))


def test_who_iterates_over_the_text_is_not_left_waiting():
    """As in transformers' documents: a generation in a thread, its text read in another."""
    from transformers import TextIteratorStreamer

    for place in ("denoiser", "prompt"):
        denoiser, reward, _ = fails_in(place, RuntimeError("gone"))
        prompt = "the" if place == "denoiser" else "the [MASK]"
        streamer = TextIteratorStreamer(denoiser.tokenizer, timeout=30)

        def work(prompt=prompt, denoiser=denoiser, reward=reward, streamer=streamer):
            with pytest.raises((RuntimeError, ValueError)):
                generate(prompt, denoiser, reward, ONE, seed=1, streamer=streamer)

        thread = threading.Thread(target=work)
        thread.start()
        assert isinstance("".join(streamer), str)
        thread.join()


def test_callback_sees_every_step():
    states = []
    output = generate("the", tiny.denoiser(), tiny.bert_reward(), CONFIG, seed=1, callback_on_step_end=states.append)
    assert [state.step for state in states] == output.history.step
    assert [state.reward.mean().item() for state in states] == output.history.reward
    assert all(state.steps == 5 and state.tokens.shape == (2, 8) for state in states)


@pytest.mark.parametrize("guidance", ["entrgi", "none"])
def test_invalid_logits_name_the_step(guidance):
    denoiser = tiny.denoiser()
    plain, calls = denoiser.logits, []

    def broken(*args):
        calls.append(1)
        logits = plain(*args)
        return logits.fill_(float("nan")) if len(calls) == 2 else logits

    denoiser.logits = broken
    config = SamplerConfig(num_return_sequences=2, max_new_tokens=5, steps=5, guidance=guidance)
    with pytest.raises(RuntimeError, match="denoising step 2 of 5: "):
        generate("the", denoiser, tiny.bert_reward(), config, seed=1)


@pytest.mark.parametrize(("before", "after"), [(0, 4), (1, 1), (2, 2), (4, 4)])
def test_the_reward_is_blamed_only_where_it_fails_first(before, after):
    """Invalid logits make the reward NaN, too: their flag, set by the operators on CUDA, must stand alone."""
    flag = torch.tensor([before], dtype=torch.int32)
    optimize_logits(
        torch.randn(2, 6),
        torch.randn(6, 3),
        torch.zeros(1, 2, 3),
        torch.arange(2),
        torch.zeros(1, 2, dtype=torch.long),
        lambda embeds, _ids: embeds.sum(dim=(1, 2)) * torch.nan,
        keys=torch.zeros(2, 4, dtype=torch.long),
        steps=1,
        error_flag=flag,
    )
    assert flag.item() == after


def test_error_flag_names_the_step():
    """Where operators do not raise (CUDA), the flags read at the end do."""
    from entrgi.generation import prepare

    task = prepare(
        ["the"],
        tiny.denoiser(),
        tiny.bert_reward(),
        CONFIG,
        seed=1,
        generator=None,
        trajectory_seeds=None,
        forbidden_ids=(),
    )
    task.raise_on_error()
    task.error_flags[3] = 3
    with pytest.raises(RuntimeError, match=r"denoising step 3 of 5: logits with NaN.* and .*every finite id"):
        task.raise_on_error()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_reports_are_fp32_whatever_the_default_dtype(default):
    models = tiny.denoiser(), tiny.bert_reward()
    expected = generate("the", *models, CONFIG, seed=1, output_history=True)
    try:
        torch.set_default_dtype(default)
        output = generate("the", *models, CONFIG, seed=1, output_history=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.candidate_rewards.dtype == torch.float32
    for got, state in zip(output.steps, expected.steps, strict=True):
        for name in ("entropy", "weight", "reward"):
            torch.testing.assert_close(getattr(got, name), getattr(state, name), rtol=0, atol=0, equal_nan=True)
