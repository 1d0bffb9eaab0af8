"""What only a GPU can show of the operators: CUDA graphs, no waiting for the device, more than 2^31 elements."""

import pytest
import torch

from entrgi_ext import adam_step_, gumbel_perturb, logit_gradient, logit_statistics, relaxed_embedding, sample_tokens
from support.calls import OPERATORS, WRITTEN, arguments, call
from support.helpers import assert_same, position_keys, random_keys, relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(5, 37, 8), (70, 9001, 264), (20, 152_064, 72)]


def results_of(name, keywords):
    result = call(name, keywords)
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    return (*results, *(keywords[key] for key in WRITTEN.get(name, [])))


def copied(keywords):
    return {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
def test_no_operator_waits_for_the_device(name, n, v, d, dtype):
    keywords = arguments(name, "cuda", dtype, n, v, d)
    call(name, copied(keywords))
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
def test_replayed_graphs_equal_eager_calls(name, n, v, d, dtype):
    given = arguments(name, "cuda", dtype, n, v, d)
    expected = [x.clone() for x in results_of(name, copied(given))]
    static = copied(given)
    call(name, copied(given))  # what is set up once is set up before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results_of(name, static)
    for _ in range(2):
        for key, x in given.items():
            if isinstance(x, torch.Tensor):
                static[key].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b, name)


def test_replays_draw_afresh():
    """The keys are read when a graph runs, so writing new ones is all it takes."""
    logits = torch.randn(64, 152_064, device="cuda", dtype=torch.bfloat16)
    keys = random_keys(64, "cuda")
    sample_tokens(logits, keys, 0.7, 0.95)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        drawn = sample_tokens(logits, keys, 0.7, 0.95).token
    seen = []
    for seed in (11, 12, 13):
        keys.copy_(position_keys(64, "cuda", seed))
        graph.replay()
        assert_same(drawn, sample_tokens(logits, keys.clone(), 0.7, 0.95).token)
        seen.append(drawn.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_31_elements(dtype):
    """The last rows of a matrix with more elements than int32 counts, against the same rows on their own."""
    v, d, last = 152_064, 64, 8
    n = 2**31 // v + 2 * last
    assert n * v > 2**31
    logits = torch.empty(n, v, device="cuda", dtype=dtype).normal_(std=3)
    keys = position_keys(n, "cuda")
    embedding = torch.randn(v, d, device="cuda").bfloat16()
    grad = torch.randn(n, d, device="cuda").bfloat16()
    tail = slice(n - last, n)

    def close(a, b, bound=1e-5):
        assert relative_l2(a, b) <= bound

    many, few = logit_statistics(logits, 0.7), logit_statistics(logits[tail], 0.7)
    close(many.logsumexp[tail], few.logsumexp)
    assert torch.equal(many.argmax[tail], few.argmax)
    drawn = sample_tokens(logits, keys, 0.7, 0.95).token[tail]
    assert torch.equal(drawn, sample_tokens(logits[tail], keys[tail], 0.7, 0.95).token)
    assert torch.equal(gumbel_perturb(logits, keys, 0.7)[tail], gumbel_perturb(logits[tail], keys[tail], 0.7))

    soft = relaxed_embedding(logits, embedding, 0.7, logsumexp=many.logsumexp)[1]
    lse, part = many.logsumexp[tail], (grad[tail], logits[tail])
    close(soft[tail], relaxed_embedding(logits[tail], embedding, 0.7, logsumexp=lse)[1], 1e-4)
    gradient = logit_gradient(grad, logits, many.logsumexp, embedding, soft, 0.7)[tail]
    close(gradient, logit_gradient(*part, lse, embedding, soft[tail], 0.7))

    moments = [torch.zeros(n, v, device="cuda") for _ in "mv"]
    tails = [logits[tail].clone(), *(torch.zeros(last, v, device="cuda") for _ in "mv")]
    adam = {"lr": 0.5, "step": 2}
    adam_step_(logits, *moments, grad, many.logsumexp, embedding, soft, 0.7, **adam)
    adam_step_(*tails, grad[tail], lse, embedding, soft[tail], 0.7, **adam)
    for a, b in zip((logits, *moments), tails, strict=True):
        close(a[tail], b)
