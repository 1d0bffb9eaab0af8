"""Generations in threads: each gives what it gives alone, whatever the others do with the same models."""

import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Barrier, Event, Lock
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

import entrgi.graphs
from entrgi import MaskedLM, SequenceClassifierReward, generate, matmul
from entrgi.graphs import GuidanceGraphs
from entrgi.guidance import GuidanceOutput
from entrgi.models.checkpoints import without_report
from entrgi.prompts import Completion
from entrgi.vocabulary import alignment
from support import binding, tiny, wrappers
from support.grids import few
from support.wrappers import KINDS, OPTIONS, same_output

THREADS = 4
PROMPTS = ["the", "the movie was w1 w2 w3", "w5 w6", "w7 w8 w9 w10"]
DENOISERS = [name for name, kind in KINDS.items() if kind.is_denoiser]
REWARDS = [name for name, kind in KINDS.items() if not kind.is_denoiser]


@pytest.fixture(autouse=True)
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(calls):
    """Their results, all begun at once."""
    start = Barrier(len(calls))

    def run(call):
        torch.set_num_threads(1)
        start.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, call) for call in calls]]


def generations(pairs, rounds=2):
    """Calls with one of ``pairs``, a prompt and a seed each, so that no two threads work on the same shapes."""
    return [
        lambda i=i: [
            generate(PROMPTS[(i + r) % 4], *pairs[i % len(pairs)], seed=i + 10 * r, **OPTIONS) for r in range(rounds)
        ]
        for i in range(THREADS)
    ]


def check(pairs):
    calls = generations(pairs)
    alone = [call() for call in calls]
    for together, expected in zip(in_threads(calls), alone, strict=True):
        assert all(same_output(a, b) for a, b in zip(together, expected, strict=True))


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("training", [True, False], ids=["in training", "in evaluation"])
@pytest.mark.parametrize("name", KINDS)
def test_threads_equal_single_runs(name, training):
    kind = KINDS[name]
    check([kind.pair(kind.make(kind.model().train(training)))])


@pytest.mark.parametrize("reward", ["classifier bert", "likelihood untied", "WeightedReward"])
def test_different_denoisers_share_a_reward(reward):
    shared = KINDS[reward].make(KINDS[reward].model())
    check([(KINDS[name].make(KINDS[name].model()), shared) for name in ("MaskedLM", "Dream", "LLaDA")])


@pytest.mark.parametrize("name", few(KINDS, "MaskedLM", "LLaDA", "likelihood tied", "WeightedReward"))
def test_one_model_in_two_wrappers(name):
    kind = KINDS[name]
    model = kind.model()
    check([kind.pair(kind.make(model)), kind.pair(kind.make(model))])


@pytest.mark.parametrize("name", REWARDS)
def test_scores(name):
    reward = KINDS[name].make(KINDS[name].model())
    texts = [[Completion(p, f"{p} good w{i}", f"good w{i}") for p in PROMPTS[: i + 1]] for i in range(THREADS)]
    calls = [lambda t=t: [reward.score(t) for _ in range(10)] for t in texts]
    alone = [call() for call in calls]
    for together, expected in zip(in_threads(calls), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


@pytest.mark.parametrize("name", DENOISERS)
def test_a_pass_in_the_middle_of_another(name):
    """Made to order: a whole call of one thread while another is inside the first layer of the body."""
    kind = KINDS[name]
    denoiser = kind.make(kind.model())
    tokens = torch.tensor([[2, 5, 6, 4, 4, 4, 3]])
    ours, theirs = torch.tensor([3, 4]), torch.tensor([5, 1, 2])
    expected = [denoiser.logits(tokens, None, positions) for positions in (ours, theirs)]
    inside, done, first = Event(), Event(), Lock()

    def pause(_module, _inputs):
        if first.acquire(blocking=False):
            inside.set()
            assert done.wait(timeout=60)

    module = getattr(denoiser, "model", None) or denoiser.function
    with module.base_model.register_forward_pre_hook(pause), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(denoiser.logits, tokens, None, ours)
        assert inside.wait(timeout=60)
        quick = denoiser.logits(tokens, None, theirs)
        done.set()
        assert torch.equal(quick, expected[1])
        assert torch.equal(slow.result(timeout=60), expected[0])


def test_a_user_s_own_pass_in_the_middle_of_ours():
    """The model itself gives its full logits meanwhile."""
    model = KINDS["MaskedLM"].model().eval()
    denoiser = MaskedLM(model, tiny.tokenizer())
    tokens, full = torch.tensor([[2, 5, 6, 4, 3]]), []
    hook = lambda _module, _inputs: full.append(model(input_ids=tokens).logits.shape)  # noqa: E731
    with denoiser.model.base_model.register_forward_pre_hook(hook):
        assert denoiser.logits(tokens, None, torch.tensor([3])).shape == (1, 64)
    assert full == [(1, 5, 64)]


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_a_pass_changes(rope):
    """transformers keeps them in the module: here another sequence comes between their change and their use."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    model = wrappers._classifier("llama", rope_parameters=parameters, max_position_embeddings=16)
    reward = SequenceClassifierReward(model, tiny.tokenizer(chat=tiny.CHAT), max_length=40)
    short, long = ([Completion("the", text, text)] for text in ("w1", " ".join(f"w{i}" for i in range(20))))
    expected = reward.score(long), reward.score(short)
    inside, done = Event(), Event()
    inner = inspect.unwrap(type(reward.model.model.rotary_emb).forward).__code__

    def trace(frame, event, _argument):
        if event == "call" and frame.f_code is inner:
            inside.set()
            done.wait(timeout=0.5)

    def slow():
        sys.settrace(trace)
        try:
            return reward.score(long)
        finally:
            sys.settrace(None)

    def quick():
        assert inside.wait(timeout=60)
        value = reward.score(short)
        done.set()
        return value

    before = wrappers.appearance(model)
    assert in_threads([slow, quick]) == list(expected)
    assert wrappers.appearance(model) == before, "nothing is written into the model's own"


class TestMatmul:
    """The setting of fp32 products belongs to the process."""

    @pytest.fixture(autouse=True)
    def faster(self, monkeypatch):
        monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
        before = torch.backends.mkldnn.matmul.fp32_precision
        yield
        assert not matmul._permission.users
        torch.backends.mkldnn.matmul.fp32_precision = before

    def test_generations_of_which_some_fail(self):
        before, models, seen = torch.backends.mkldnn.matmul.fp32_precision, KINDS["MaskedLM"], set()
        pair = models.pair(models.make(models.model()))

        def call(i):
            def callback(state):
                seen.add(torch.backends.mkldnn.matmul.fp32_precision)
                if i % 2 and state.step == i:
                    raise InterruptedError

            try:
                return generate(PROMPTS[i], *pair, seed=i, callback_on_step_end=callback, **OPTIONS)
            except InterruptedError:
                return None

        outputs = in_threads([lambda i=i: call(i) for i in range(THREADS)])
        assert [output is None for output in outputs] == [False, True, False, True]
        assert seen == {"bf16"}
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_what_the_user_sets_meanwhile_stays(self):
        settings = torch.backends.mkldnn.matmul
        with matmul.onednn_matmul(torch.device("cpu")):
            with matmul.onednn_matmul(torch.device("cpu")):
                settings.fp32_precision = "ieee"
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "ieee"


def test_verbosity_outlives_the_first_of_two_loadings():
    before = logging.get_verbosity()
    first, second = without_report(), without_report()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.get_verbosity() == logging.ERROR
    second.__exit__(None, None, None)
    assert logging.get_verbosity() == before


def test_an_alignment_of_another_width_in_between(monkeypatch):
    """Two denoisers of one tokenizer and different widths: the second's takes the first's place as it is made."""
    ours, theirs = tiny.tokenizer(), tiny.tokenizer()

    class Kept(dict):
        """The cache of one denoiser's tokenizer, into which another thread writes behind our back."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if len(value[1].ids) == 64:
                with ThreadPoolExecutor(1) as pool:
                    assert len(pool.submit(alignment.align, ours, 60, theirs).result(timeout=60).ids) == 60

    monkeypatch.setattr(alignment, "_MADE", {ours: Kept()})
    assert len(alignment.align(ours, 64, theirs).ids) == 64


def test_captures_take_turns_and_let_others_work(monkeypatch):
    """Two captures at once would end each other; what another thread does on the device must not end one."""
    inside, modes, most = [], [], []

    @contextmanager
    def graph(_graph, pool, stream, capture_error_mode="global"):
        modes.append(capture_error_mode)
        inside.append(1)
        most.append(len(inside))
        Event().wait(0.02)
        yield
        inside.pop()

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    fakes = {"CUDAGraph": lambda: SimpleNamespace(pool=lambda: None, replay=lambda: None), "graph": graph}
    fakes |= {"stream": lambda _stream: nullcontext(), "device": lambda _device: nullcontext()}
    fakes |= {"current_stream": lambda: stream, "Stream": lambda: stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(entrgi.graphs, "warm_up", lambda _device: None)

    def optimize(logits, error_flag):
        return GuidanceOutput(logits[None], logits[None], logits)

    def capture():
        graphs = GuidanceGraphs(torch.device("cpu"))
        return graphs(optimize, {"logits": torch.zeros(3), "error_flag": torch.zeros(1)}, (0,))

    in_threads([capture] * 3)
    assert set(modes) == {"thread_local"}
    assert max(most) == 1


def test_bound_rewards_are_each_generation_s_own():
    """Two bound rewards of one reward, read by turns."""
    reward = KINDS["classifier qwen3"].make(KINDS["classifier qwen3"].model())
    places = [binding.layouts(["the movie"], [4]), binding.layouts(["w1 w2 w3"], [6])]
    ids = [binding.tokens(place, 2, seed=i) for i, place in enumerate(places)]
    bound = [reward.bind(binding.denoiser(), place, 2) for place in places]
    calls = [
        lambda b=b, i=i: [binding.value_and_gradient(b, i) for _ in range(10)] for b, i in zip(bound, ids, strict=True)
    ]
    alone = [call() for call in calls]
    for together, expected in zip(in_threads(calls), alone, strict=True):
        for a, b in zip(together, expected, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
