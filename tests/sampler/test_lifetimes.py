"""What is kept, for how long, and how much of it: captured graphs, generations that are over, temporaries."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entrgi.sampler
from entrgi import generate, guidance
from entrgi.graphs import GuidanceGraphs
from entrgi.guidance import GuidanceOutput
from entrgi.outputs import HistoryBuilder
from sampler.test_graphs import ReplayedByCalling
from support import tiny
from support.host_reads import NoHostReads

OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 6, "steps": 6, "seed": 1}


@pytest.fixture
def cuda_without_a_device(monkeypatch):
    """torch.cuda's functions of a capture, which then runs at once; its graph replays nothing."""

    class Graph:
        def pool(self):
            return 0, 0

        def replay(self):
            pass

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    fakes = {"CUDAGraph": Graph, "graph": lambda _graph, **_options: nullcontext()}
    fakes |= {"stream": lambda _stream: nullcontext(), "device": lambda _device: nullcontext()}
    fakes |= {"current_stream": lambda: stream, "Stream": lambda: stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return fakes


def output_of(value):
    return GuidanceOutput(value[None], value[None], value)


def tensors():
    return {"logits": torch.zeros(3), "error_flag": torch.zeros(1)}


def test_a_graph_keeps_what_it_reads(cuda_without_a_device):
    """The bound reward of some of the trajectories exists for one step; its addresses are in the graph."""
    graphs = GuidanceGraphs(torch.device("cpu"))

    def step():
        read = torch.ones(3)
        graphs(lambda logits, error_flag: output_of(logits + read), tensors(), (0, 2))
        return weakref.ref(read)

    assert step()() is not None


def test_a_capture_that_fails_says_so(cuda_without_a_device, monkeypatch):
    @contextmanager
    def refused(_graph, **_options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    graphs = GuidanceGraphs(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"cuda_graphs: the reward model cannot be captured .*not permitted"):
        graphs(lambda logits, error_flag: output_of(logits), tensors(), (0,))


def test_a_generation_that_is_over_is_freed(monkeypatch):
    """Graphs, their memory and the reward's embedding go with it, and wait for no collection of cycles."""
    prepare, tasks = entrgi.sampler.prepare, []

    def watched(*args, **options):
        task = prepare(*args, **options)
        object.__setattr__(task, "graphs", ReplayedByCalling(task.denoiser.device))
        tasks.append(weakref.ref(task))
        return task

    monkeypatch.setattr(entrgi.sampler, "prepare", watched)
    models = tiny.denoiser(), tiny.bert_reward()
    gc.collect()
    gc.disable()
    try:
        generate(["the", "w1 w2"], *models, **OPTIONS, max_rows=13)
        assert tasks[0]() is None
    finally:
        gc.enable()


def test_history_asks_the_device_once(monkeypatch):
    states = generate("the", tiny.denoiser(), tiny.bert_reward(), **OPTIONS, output_history=True).steps
    history = HistoryBuilder(keep_states=False)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    with NoHostReads():
        for state in states:
            history.add(state)
        result = history.history()
    assert len(reads) == 1
    assert result.committed == [int(state.committed.sum()) for state in states]
    assert result.reward == pytest.approx([state.reward.mean().item() for state in states])


class Widest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.is_mutable and not result._is_view():
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_with_a_gradient_makes_nothing_of_the_logits_size(optimizer, dtype):
    torch.manual_seed(0)
    logits, gradient = torch.randn(200, 50).to(dtype), torch.randn(200, 50)
    moments = [torch.empty(200, 50) for _ in "mv"]
    whole = guidance.reference.adam_step(logits, None, None, gradient, 0.5, *guidance.BETAS, guidance.EPS, 1)
    expected = whole[0] if optimizer == "adam" else (logits + 0.5 * gradient).to(dtype)
    with Widest() as widest:
        guidance._step_with_gradient_(logits, moments, gradient, optimizer, 0.5, 1)
    assert widest.numbers <= guidance.CHUNK * 50
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.0)
    if optimizer == "adam":
        assert all(torch.equal(got, moment) for got, moment in zip(moments, whole[1:], strict=True))
