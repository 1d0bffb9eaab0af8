"""The arguments, outputs, callbacks and streams of ``generate``; no waiting for the device inside a step."""

import math

import numpy as np
import pytest
import torch

from entrgi import SamplerConfig, generate, preset, timing
from support import method, tiny
from support.host_reads import NoHostReads
from support.transcribe import EOS, MASK, PROMPTS, SEEDS, method_options, nan_like, tiny_models, trajectory, transcribed

SMALL = {"num_return_sequences": 2, "max_new_tokens": 5, "steps": 4}


def run(prompts=PROMPTS[0], config=None, models=None, **options):
    return generate(prompts, *(models or tiny_models(torch.float32)), config, **{"seed": 3, **SMALL, **options})


@pytest.mark.parametrize(
    ("alias", "named"),
    [
        ({"gen_length": 6}, {"max_new_tokens": 6}),
        ({"num_inference_steps": 3}, {"steps": 3}),
        ({"remasking": "low_confidence"}, {"alg": "maskgit_plus"}),
        ({"remasking": "maskgit_plus"}, {"alg": "maskgit_plus"}),
        ({"remasking": "origin"}, {"alg": "origin"}),
        ({"mask_id": 4}, {}),
    ],
    ids=str,
)
def test_aliases(alias, named):
    models = tiny_models(torch.float32)
    plain = {name: value for name, value in {**SMALL, "seed": 3}.items() if name not in named}
    for name, replaced in (("gen_length", "max_new_tokens"), ("num_inference_steps", "steps")):
        if name in alias:
            plain.pop(replaced, None)
    by_alias = generate("the movie", *models, **plain, **alias)
    by_name = generate("the movie", *models, **plain, **named)
    assert torch.equal(by_alias.sequences, by_name.sequences)
    if named:
        assert not torch.equal(by_alias.sequences, run().sequences)


def test_ways_to_give_the_options():
    """A configuration, a preset's name, options alone, and options over either."""
    expected = run().sequences
    config = SamplerConfig(**SMALL)
    models = tiny_models(torch.float32)
    assert torch.equal(generate(PROMPTS[0], *models, config, seed=3).sequences, expected)
    assert torch.equal(generate(PROMPTS[0], *models, "paper", seed=3, **SMALL).sequences, expected)
    longer = generate(PROMPTS[0], *models, config, seed=3, max_new_tokens=7)
    assert torch.equal(longer.sequences, run(max_new_tokens=7).sequences)
    assert config.max_new_tokens == 5, "the caller's own is left alone"
    rgrl = generate(PROMPTS[0], *models, "rgrl", seed=3, **SMALL).sequences
    assert torch.equal(rgrl, generate(PROMPTS[0], *models, preset("rgrl", **SMALL), seed=3).sequences)
    assert not torch.equal(rgrl, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": np.int64(4), "max_new_tokens": np.int32(5)},
        {"temperature": np.float64(0.7), "top_p": np.float32(0.95)},
        {"seed": np.int64(3)},
        {"early_exit": np.bool_(False)},
    ],
    ids=str,
)
def test_numpy_scalars_mean_what_they_say(options):
    expected = {name: value.item() for name, value in options.items()}
    assert torch.equal(run(**options).sequences, run(**expected).sequences)


def test_sequences_alone():
    output = run(PROMPTS)
    alone = run(PROMPTS, return_dict_in_generate=False)
    assert isinstance(alone, torch.Tensor)
    assert alone.shape == (4, output.sequences.shape[-1])
    assert torch.equal(alone, output.sequences.flatten(0, 1))
    best = run(PROMPTS, return_dict_in_generate=False, best_of=3)
    assert torch.equal(best, run(PROMPTS, best_of=3).sequences.flatten(0, 1))


def test_windows():
    output = run(PROMPTS[0])
    assert output.windows == [(3, 8)]
    output = run(["the", "w1 w2 w3"], max_new_tokens=2)
    assert [tuple(window) for window in output.windows] == [(2, 4), (4, 6)]
    output = run(["w1 [MASK] w2 [MASK] w3"], infill=True, max_new_tokens=0)
    start, stop = output.windows[0]
    assert (start, stop) == (2, 6)


class Stream:
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, ids):
        assert not self.ended
        assert isinstance(ids, torch.Tensor)
        assert ids.device.type == "cpu"
        assert ids.dim() == (1 if self.parts else 2), "the prompt as a batch of one, then single ids"
        self.parts.append(ids.flatten().tolist())

    def end(self):
        self.ended += 1

    def received(self):
        """The response so far."""
        return [token for part in self.parts[1:] for token in part]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": "none"},
        {"block_length": 1, "max_new_tokens": 6, "steps": 6},
        {"alg": "origin", "max_new_tokens": 8},
        {"threshold": -2.0},
        {"early_exit": True, "deprioritize_eos": False, "eos_bias": 5.0, "max_new_tokens": 8, "steps": 8},
    ],
    ids=str,
)
def test_streamer(options):
    """The prompt, after each step exactly what is newly known from the left, in the end all up to the first end."""
    options = {"num_return_sequences": 1, **options}
    models = tiny_models(torch.float32, eos_bias=options.pop("eos_bias", 0.0))
    stream, prefixes, received = Stream(), [], []

    def look(state):
        response = state.tokens[0, 3 : 3 + options.get("max_new_tokens", 5)].tolist()
        known = min(response.index(token) if token in response else len(response) for token in (MASK, EOS))
        prefixes.append(response[:known])
        received.append(stream.received())

    output = run(models=models, streamer=stream, callback_on_step_end=look, **options)
    response = output.sequences[0, 0, slice(*output.windows[0])].tolist()
    assert stream.parts[0] == output.sequences[0, 0, : output.windows[0][0]].tolist()
    assert stream.received() == (response[: response.index(EOS)] if EOS in response else response)
    assert stream.ended == 1
    assert [] not in stream.parts
    # Whether the callback or the stream comes first in a step, what has been streamed is a known prefix.
    for known, got, before in zip(prefixes, received, [[], *prefixes], strict=False):
        assert got in (known, before)
    assert len(stream.parts) == 1 + len({len(prefix) for prefix in prefixes} - {0})
    assert torch.equal(run(models=models, **options).sequences, output.sequences)


def test_streamer_of_transformers():
    from transformers import TextStreamer

    class Collected(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    models = tiny_models(torch.float32)
    stream = Collected(models[0].tokenizer, skip_prompt=True)
    output = run(models=models, streamer=stream, num_return_sequences=1)
    response = output.sequences[0, 0, slice(*output.windows[0])].tolist()
    assert stream.text.split() == [tiny.WORDS[token] for token in response]


def test_streamer_of_one_trajectory_only():
    for prompts, options in ((PROMPTS[0], {}), (PROMPTS, {"num_return_sequences": 1})):
        with pytest.raises(ValueError, match="streamer"):
            run(prompts, streamer=Stream(), **options)
    with pytest.raises(ValueError, match="streamer"):
        run(PROMPTS[0], num_return_sequences=1, best_of=2, streamer=Stream())


HISTORIES = [
    {},
    {"guidance": "none"},
    {"block_length": 2, "max_new_tokens": 6, "steps": 7},
    {"alg": "origin", "max_new_tokens": 7, "steps": 6},
    {"guidance_interval": 2, "steps": 5},
    {"schedule": "rgrl", "max_new_tokens": 4, "steps": 8},
    {"guidance_steps": 1},
    {"reward_scale": 2.0},
]


def recorded(prompts, options, dtype=torch.float64, **generation):
    models = tiny_models(dtype, eos_bias=options.pop("eos_bias", 0.0))
    options = {"max_new_tokens": 5, "steps": 4, **options}
    seeds = SEEDS[: len(prompts), :2]
    output = generate(
        prompts,
        *models,
        trajectory_seeds=seeds,
        num_return_sequences=2,
        output_history=True,
        **{**options, **generation},
    )
    length = options["max_new_tokens"]
    expected = transcribed(*models, prompts, seeds, method_options(**options), length, options.get("infill", False))
    return output, expected


@pytest.mark.parametrize("options", HISTORIES, ids=str)
def test_every_step_against_the_method(options):
    """Tokens, committed positions, entropies, weights and rewards of every step and trajectory."""
    prompts = ["the movie", "w3 was w9 bad"]
    output, expected = recorded(prompts, options.copy())
    made = sorted({step.step for _, steps in expected for step in steps})
    assert [state.step for state in output.steps] == made == output.history.step
    width = output.sequences.shape[-1]
    guided_weights = {}
    for p, (_, steps) in enumerate(expected):
        by_step = {step.step: step for step in steps}
        tokens = trajectory(prompts[p // 2], options.get("max_new_tokens", 5), False)[0]
        for state in output.steps:
            step = by_step.get(state.step)
            assert state.steps == options.get("steps", 4)
            for tensor in (state.tokens, state.committed, state.entropy, state.weight, state.reward):
                assert tensor.device.type == "cpu"
            assert state.seconds > 0
            if step is None:  # this trajectory waits
                assert state.tokens[p, : len(tokens)].tolist() == tokens
                assert not state.committed[p].any()
                assert state.entropy[p].isnan().all()
                assert state.weight[p].isnan().all()
                assert state.reward[p].isnan()
                continue
            tokens = step.tokens
            assert state.tokens[p, : len(tokens)].tolist() == tokens
            assert set(state.committed[p].nonzero().flatten().tolist()) == step.committed
            for got, values in ((state.entropy[p], step.entropy), (state.weight[p], step.weight)):
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, nan_like(values, width), equal_nan=True, rtol=1e-5, atol=1e-6)
            assert math.isnan(step.reward) == bool(state.reward[p].isnan())
            if not math.isnan(step.reward):
                assert state.reward[p].item() == pytest.approx(step.reward, rel=1e-5, abs=1e-6)
            guided_weights.setdefault(state.step, []).extend(step.weight.values())
    for i, step in enumerate(output.history.step):
        rewards = [s.reward for _, steps in expected for s in steps if s.step == step and not math.isnan(s.reward)]
        committed = [len(s.committed) for _, steps in expected for s in steps if s.step == step]
        assert output.history.committed[i] == sum(committed)
        if rewards:
            assert output.history.reward[i] == pytest.approx(np.mean(rewards), rel=1e-5, abs=1e-6)
            assert output.history.weight[i] == pytest.approx(np.mean(guided_weights[step]), rel=1e-5, abs=1e-6)
        else:
            assert output.history.reward[i] is None
            assert output.history.weight[i] is None
    assert sum(output.history.committed) == 2 * 2 * options.get("max_new_tokens", 5)


def test_history_of_waiting_trajectories():
    """Holes of different number: in some steps a trajectory waits, in some it is done."""
    prompts = ["the [MASK] was", "[MASK] [MASK] w3 [MASK] [MASK]"]
    output, expected = recorded(prompts, {"infill": True, "max_new_tokens": 0, "steps": 5, "schedule": "uniform"})
    assert [step.step for step in expected[0][1]] == [0]
    for state in output.steps[1:]:
        assert state.entropy[:2].isnan().all()
        assert state.reward[:2].isnan().all()
        assert not state.committed[:2].any()
        assert not state.reward[2:].isnan().any()
    by_trajectory = torch.stack([state.committed.sum(1) for state in output.steps]).sum(0)
    assert by_trajectory.tolist() == [1, 1, 4, 4]


def test_history_with_threshold_and_early_exit():
    options = {"threshold": -1.5, "eos_bias": 4.0, "early_exit": True, "max_new_tokens": 8, "steps": 8}
    output, expected = recorded(["the movie"], {**options, "deprioritize_eos": False})
    for p, (tokens, steps) in enumerate(expected):
        states = [state for state in output.steps if state.committed[p].any()]
        assert [state.step for state in states] == [step.step for step in steps]
        for state, step in zip(states, steps, strict=True):
            assert state.tokens[p].tolist() == step.tokens
            assert step.committed <= set(state.committed[p].nonzero().flatten().tolist())
        assert states[-1].tokens[p].tolist() == tokens


def test_no_history_by_default():
    assert run().steps is None


def test_callback_states():
    """Each as it was after its step, even when read after the next one."""
    states = []
    output = run(PROMPTS, callback_on_step_end=states.append, output_history=True)
    assert [state.step for state in states] == output.history.step == [state.step for state in output.steps]
    masked = 4 * 5
    for state, kept in zip(states, output.steps, strict=True):
        assert state.steps == 4
        assert state.tokens.shape == state.committed.shape == state.entropy.shape == state.weight.shape == (4, 9)
        masked -= int(state.committed.sum())
        assert (kept.tokens == MASK).sum() == masked
        assert torch.equal(state.committed.cpu(), kept.committed)
        torch.testing.assert_close(state.entropy.cpu(), kept.entropy, equal_nan=True)
        assert torch.equal(state.tokens.cpu(), kept.tokens)
    assert masked == 0
    assert torch.equal(states[-1].tokens, output.sequences.flatten(0, 1))


def test_history_of_the_best():
    """Rows of the states are the trajectories returned, in their order; the sums are over all that were made."""
    every = run(PROMPTS, num_return_sequences=4, output_history=True)
    best = run(PROMPTS, best_of=4, output_history=True)
    assert torch.equal(best.candidate_rewards, every.rewards)
    assert torch.equal(every.candidate_rewards, every.rewards)
    order = every.rewards.argsort(dim=1, descending=True)[:, :2]
    rows = (order + 4 * torch.arange(2)[:, None]).flatten()
    assert rows.tolist() != [0, 1, 4, 5]
    assert torch.equal(best.sequences.flatten(0, 1), every.sequences.flatten(0, 1)[rows])
    assert torch.equal(best.seeds.flatten(), every.seeds.flatten()[rows])
    assert best.responses == [[every.responses[b][k] for k in order[b].tolist()] for b in range(2)]
    for chosen, all_ in zip(best.steps, every.steps, strict=True):
        assert torch.equal(chosen.tokens, all_.tokens[rows])
        assert torch.equal(chosen.committed, all_.committed[rows])
        torch.testing.assert_close(chosen.weight, all_.weight[rows], equal_nan=True)
        torch.testing.assert_close(chosen.reward, all_.reward[rows])
    assert best.history.committed == every.history.committed
    assert (best.rewards[:, :-1] >= best.rewards[:, 1:]).all()


def test_order_of_equal_rewards():
    """Ties keep the order of the seeds."""
    models = tiny_models(torch.float32)
    seeds = torch.arange(40)[None]
    options = {"num_return_sequences": 3, "best_of": 40, "max_new_tokens": 2, "steps": 2, "guidance": "none"}
    models[1].score = lambda completions: torch.zeros(len(completions))
    output = generate("the", *models, trajectory_seeds=seeds, **options)
    assert output.seeds.tolist() == [[0, 1, 2]]


class Watch(timing.Recorder):
    """Stands in for a recorder of times: puts the refusal around every denoising step."""

    def __init__(self):
        super().__init__()
        self.steps_seen = 0
        self.stack = []

    def begin(self, name):
        mode = None
        if name == timing.STEP:
            self.steps_seen += 1
            mode = NoHostReads()
            mode.__enter__()
        self.stack.append(mode)

    def end(self):
        mode = self.stack.pop()
        if mode is not None:
            mode.__exit__(None, None, None)


def refuse_reading(patch):
    """Values also leave a tensor past the dispatcher."""

    def reading(name, plain):
        def method(self, *args, **kwargs):
            inside = torch.utils._python_dispatch._get_current_dispatch_mode()
            assert not isinstance(inside, NoHostReads), f"Tensor.{name} waits for the device"
            return plain(self, *args, **kwargs)

        return method

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        patch.setattr(torch.Tensor, name, reading(name, getattr(torch.Tensor, name)), raising=False)


STATIC = [
    {},
    {"guidance": "none"},
    {"guidance": "aps", "top_k": 5, "alg_temp": 0.5},
    {"guidance": "gumbel", "optimizer": "sgd"},
    {"guidance": "expectation", "alg": "maskgit_plus", "row_bucket": 8},
    {"block_length": 2, "max_new_tokens": 6},
    {"alg": "origin"},
    {"alg": "topk_margin", "guidance_interval": 2},
    {"alg": "anchor", "max_rows": 6, "guidance": "none"},
    {"schedule": "rgrl", "entropy_rule": "filtered", "deprioritize_eos": False},
    {"schedule": "uniform", "output_history": False},
]


@pytest.mark.parametrize("reward", ["bert", "qwen3"])
@pytest.mark.parametrize("options", STATIC, ids=str)
def test_no_waiting_for_the_device_inside_a_step(options, reward, monkeypatch):
    models = tiny_models(torch.float32, reward=reward)
    expected = run(["the movie", "w1"], models=models, **options)
    refuse_reading(monkeypatch)
    watch = Watch()
    with watch:
        output = run(["the movie", "w1"], models=models, **options)
    assert watch.steps_seen == len(output.history.step) > 2
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0, 2.0]) + x.sum(),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.long)),
        lambda x: torch.equal(x, x),
    ],
)
def test_waiting_would_be_seen(read, monkeypatch):
    """The test above can fail: a denoiser that reads a value inside a step is caught."""
    refuse_reading(monkeypatch)
    models = tiny_models(torch.float32)
    plain = models[0].logits

    def waits(*args):
        read(torch.ones(3))
        return plain(*args)

    models[0].logits = waits
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        run(models=models)


def test_ends_of_text_are_where_the_method_has_them():
    output, expected = recorded(["the movie"], {"eos_bias": 6.0, "deprioritize_eos": False})
    assert [row for row, _ in expected] == output.sequences[0].tolist()
    for k in range(2):
        response = output.sequences[0, k, 3:8].tolist()
        shown = response[: response.index(EOS)] if EOS in response else response
        assert output.responses[0][k].split() == [tiny.WORDS[i] for i in shown if i >= len(tiny.SPECIAL)]


def test_transcription_defaults_are_the_presets():
    """Options of the transcription are written out on their own: they are the same."""
    for name in ("paper", "rgrl"):
        own = method_options(name)
        for field in vars(own):
            if field not in ("mask", "eos", "ends", "pad"):
                assert getattr(preset(name), field) == getattr(own, field)
    assert method.Options(steps=1).guidance_steps == 3
