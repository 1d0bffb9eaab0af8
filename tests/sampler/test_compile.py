"""``torch.compile(fullgraph=True)`` of the M guidance steps: one graph, the backward through the reward inside."""

import pytest
import torch

import entrgi.sampler
from entrgi import generate
from entrgi.guidance import optimize_logits
from sampler.test_guidance import network, problem
from support import tiny
from support.grids import few

ENTRGI = {"guidance": "entrgi"}
CASES = [
    ENTRGI,
    {"guidance": "aps", "optimizer": "sgd"},
    {"guidance": "expectation", "steps": 1},
    {"guidance": "gumbel"},
]


@pytest.fixture(autouse=True)
def traced_autograd():
    """Without the setting Dynamo breaks the graph at ``torch.autograd.grad``."""
    torch.compiler.reset()
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip(f"torch {torch.__version__} cannot trace torch.autograd.grad")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch.compiler.reset()


def check(call, backend, tolerance):
    """``call(optimize)`` returns the guided logits, the written embeddings and the trace."""
    expected = call(optimize_logits)
    got = call(torch.compile(optimize_logits, fullgraph=True, backend=backend))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", few(["aot_eager", "inductor"], "aot_eager"))
@pytest.mark.parametrize("case", few(CASES, ENTRGI), ids=lambda case: case["guidance"])
def test_guidance_is_one_graph(case, backend):
    task, net = problem(torch.float32), network(torch.float32)

    def reward(embeddings, tokens):
        return torch.stack([net(x, mask) for x, mask in zip(embeddings, task.valid, strict=True)])

    def call(optimize):
        logits, embeds = task.logits.clone(), task.inputs_embeds.clone()
        trace = optimize(logits, task.embedding, embeds, task.rows, task.tokens, reward, keys=task.keys, **case)
        return logits, embeds, trace.rewards, trace.weights, trace.initial_entropy

    check(call, backend, 0 if backend == "aot_eager" else 1e-5)


@pytest.mark.parametrize("kind", few(["bert", "qwen3"], "bert"))
def test_guidance_through_a_reward_model_is_one_graph(monkeypatch, kind):
    """With the arguments that the sampler gives: a transformers model, prepared masks, reused prefix keys."""
    reward = tiny.bert_reward() if kind == "bert" else tiny.qwen3_reward()
    calls = []

    def recorded(**options):
        calls.append(
            {**options, "logits": options["logits"].clone(), "inputs_embeds": options["inputs_embeds"].clone()}
        )
        return optimize_logits(**options)

    monkeypatch.setattr(entrgi.sampler, "ascend", recorded)
    options = {"num_return_sequences": 2, "max_new_tokens": 4, "steps": 2, "seed": 1}
    generate(["the movie", "w3 was good w4"], tiny.denoiser(), reward, **options)

    def call(optimize):
        z, inputs = calls[-1]["logits"].clone(), calls[-1]["inputs_embeds"].clone()
        trace = optimize(**{**calls[-1], "logits": z, "inputs_embeds": inputs})
        return z, inputs, trace.rewards, trace.weights, trace.initial_entropy

    check(call, "aot_eager", 1e-5)
