"""CUDA graphs of the guidance loop. Without a GPU a stand-in replays by calling again, on the same static tensors:
what is tested then is everything around the graph (keys, static inputs, outputs, buckets)."""

from contextlib import contextmanager

import pytest
import torch

import entrgi.graphs
from entrgi import generate
from entrgi.graphs import WARM_UP, GuidanceGraphs
from entrgi.guidance import GuidanceOutput
from support import tiny

PROMPTS = ["the movie", "w3 was good w4"]
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 6, "steps": 6, "seed": 1}


class ReplayedByCalling(GuidanceGraphs):
    """Keeps the function and the static inputs of the capture, as a graph does, and runs on nothing else."""

    def __init__(self, device):
        super().__init__(device)
        self.replays = 0

    def capture(self, optimize, inputs):
        copies = {k: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for k, t in inputs.items()}
        output = optimize(**copies)

        def replay():
            self.replays += 1
            again = optimize(**inputs)
            for name in ("rewards", "weights", "initial_entropy"):
                getattr(output, name).copy_(getattr(again, name))

        return output, replay


@pytest.fixture
def graphs(monkeypatch):
    """Makes generations use the stand-in; returns the list of those made."""
    made = []

    def prepare(*args, **options):
        task = original(*args, **options)
        made.append(ReplayedByCalling(task.denoiser.device))
        object.__setattr__(task, "graphs", made[-1])
        return task

    import entrgi.sampler

    original = entrgi.sampler.prepare
    monkeypatch.setattr(entrgi.sampler, "prepare", prepare)
    return made


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"max_rows": 13}, {"guidance": "gumbel"}, {"threshold": -2.0}], ids=str)
def test_replays_give_the_same_numbers(request, kind, options):
    denoiser = tiny.denoiser(torch.float64)
    reward = tiny.bert_reward(torch.float64) if kind == "bert" else tiny.qwen3_reward(torch.float64)
    plain = generate(PROMPTS, denoiser, reward, **OPTIONS, **options)
    made = request.getfixturevalue("graphs")
    graphed = generate(PROMPTS, denoiser, reward, **OPTIONS, **options, row_bucket=8)
    assert torch.equal(plain.sequences, graphed.sequences)
    assert graphed.history.reward == pytest.approx(plain.history.reward, rel=1e-6)
    assert graphed.history.weight == pytest.approx(plain.history.weight, rel=1e-6)
    (graphs,) = made
    assert graphs.replays > len(graphs.captured) > 1, "some shape is replayed, and there are several"


def test_one_graph_for_each_bucket(graphs):
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    generate(PROMPTS, denoiser, reward, **OPTIONS, row_bucket=64)
    generate(PROMPTS, denoiser, reward, **OPTIONS)
    assert [len(g.captured) for g in graphs] == [1, 5]


def test_graphs_share_their_storage(graphs):
    """Memory is that of the largest bucket, not of all."""
    generate(PROMPTS, tiny.denoiser(), tiny.bert_reward(), **OPTIONS)
    (made,) = graphs
    addresses = {captured.inputs["logits"].data_ptr() for captured in made.captured.values()}
    assert len(addresses) == 1


class FakeCuda:
    """What a capture asks of torch.cuda on a machine with two devices, the first of them current, as far as it shows
    where things happen: ``events`` are (what, current device, stream)."""

    def __init__(self, monkeypatch):
        self.current, self.streams, self.events = 0, [], []
        for name in ("device", "stream", "graph", "Stream", "CUDAGraph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(entrgi.graphs, "warm_up", lambda device: self.note(f"warm_up of {device}"))

    def note(self, what):
        self.events.append((what, self.current, self.streams[-1] if self.streams else None))

    @contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        with self.device(f"cuda:{stream.device_index}"):
            yield
        self.streams.pop()

    def graph(self, _graph, pool=None, stream=None, capture_error_mode=None):
        # torch makes itself a stream of the current device where it is given none
        return self.stream(stream or self.Stream())

    def Stream(self, device=None):
        return FakeStream(self.current if device is None else torch.device(device).index)

    def current_stream(self, device=None):
        return self.Stream(device)

    def CUDAGraph(self):
        return FakeGraph(self)


class FakeStream:
    def __init__(self, device_index):
        self.device_index = device_index

    def wait_stream(self, other):
        assert other.device_index == self.device_index


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def pool(self):
        return 0, 0

    def replay(self):
        self.cuda.note("replay")


def test_captures_and_replays_are_on_the_models_device(monkeypatch):
    """The models are on cuda:1, the current device is cuda:0: a graph captured there would be empty."""
    cuda = FakeCuda(monkeypatch)
    graphs = GuidanceGraphs(torch.device("cuda:1"))

    def optimize(logits, error_flag):
        cuda.note("optimize")
        return GuidanceOutput(logits[None], logits[None], logits)

    for _ in range(2):
        graphs(optimize, {"logits": torch.zeros(3), "error_flag": torch.zeros(1)}, (0,))
    assert [what for what, *_ in cuda.events] == ["warm_up of cuda:1", *["optimize"] * (WARM_UP + 1), *["replay"] * 2]
    _, *rest = cuda.events
    assert {device for _, device, _ in rest} == {1}
    used = {stream for what, _, stream in rest if what == "optimize"}
    assert [stream.device_index for stream in used] == [1], "one stream for warm-up and capture"
    assert cuda.current == 0
