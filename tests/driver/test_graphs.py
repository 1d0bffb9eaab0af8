"""CUDA graphs of the guidance loop. Without a GPU a stand-in replays by calling again, on the same static tensors:
what is tested then is everything around the graph (keys, static inputs, outputs, buckets)."""

import pytest
import tiny
import torch

from entrgi import generate
from entrgi.graphs import GuidanceGraphs

PROMPTS = ["the movie", "w3 was good w4"]
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 6, "steps": 6, "seed": 1}


class ReplayedByCalling(GuidanceGraphs):
    """Keeps the function and the static inputs of the capture, as a graph does, and runs on nothing else."""

    def __init__(self, device):
        super().__init__(device)
        self.replays = 0

    def capture(self, optimize, inputs):
        trace = optimize(*(tensor.clone() for tensor in inputs))

        def replay():
            self.replays += 1
            again = optimize(*inputs)
            for name in ("rewards", "weights", "initial_entropy"):
                getattr(trace, name).copy_(getattr(again, name))

        return trace, replay


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
    addresses = {captured.inputs[0].data_ptr() for captured in made.captured.values()}
    assert len(addresses) == 1
