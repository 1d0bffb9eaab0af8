"""Schemas, fakes and autograd registration: opcheck, fakes against the real thing, torch.compile, determinism."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import entrgi_ext
from entrgi_ext import logit_statistics, reference, relaxed_embedding, sample_tokens
from support.calls import OPERATORS, WRITTEN, N, arguments, backward_arguments, call, schema_arguments
from support.helpers import LOGIT_DTYPES, assert_same, random_embedding, random_keys, random_logits, skip_fp64_on_cuda

OPTIONAL = {
    "sample_tokens": {"top_k": None, "forbidden": None, "error_flag": None},
    "relaxed_embedding": {"hard_tokens": None, "weight": None},
    "relaxed_embedding_": {"hard_tokens": None, "weight": None},
    "adam_step_": {"exp_avg": None, "exp_avg_sq": None, "step": 1, "last": True},
    "commit_": {"keys": None, "eos_token_id": None, "alg_temp": 0.0},
}


def operator(name: str):
    entrgi_ext.logit_statistics  # noqa: B018 (loads the library)
    return getattr(torch.ops.entrgi, name).default


@pytest.mark.parametrize("optional", [True, False], ids=["all given", "none given"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device, name, optional):
    keywords = arguments(name, device)
    if not optional:
        keywords.update(OPTIONAL.get(name, {}))
    torch.library.opcheck(operator(name), schema_arguments(name, keywords))


def test_opcheck_with_a_list_of_forbidden_ids(device):
    keywords = arguments("sample_tokens", device)
    keywords["forbidden"] = torch.tensor([4, 1, 4], dtype=torch.int32, device=device)
    torch.library.opcheck(operator("sample_tokens"), schema_arguments("sample_tokens", keywords))


@pytest.mark.parametrize("name", ["logit_statistics", "relaxed_embedding"])
def test_opcheck_with_gradient(device, name):
    keywords = arguments(name, device)
    keywords["logits"].requires_grad_()
    torch.library.opcheck(operator(name), schema_arguments(name, keywords))


def test_opcheck_of_the_backward_operator(device):
    given = backward_arguments(device)
    torch.library.opcheck(operator("logit_statistics_backward"), given)
    for i in range(3):
        one = tuple(given[j] if j == i else None for j in range(3))
        torch.library.opcheck(operator("logit_statistics_backward"), (*one, *given[3:]))


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("n", [5, 1, 0])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "commit_"])
def test_fakes_agree_with_the_real_ones(device, name, dtype, n):
    skip_fp64_on_cuda(device, dtype)
    given = schema_arguments(name, arguments(name, device, dtype, n=n))
    real = operator(name)(*given)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operator(name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))
    if real is None:
        assert fake is None
        return
    for a, b in zip(*(x if isinstance(x, tuple | list) else (x,) for x in (fake, real)), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_fakes_of_strided_logits(device):
    """Strides of the results do not depend on those of the logits."""
    for name in ("logit_gradient", "relaxed_embedding", "gumbel_perturb"):
        keywords = arguments(name, device)
        keywords["logits"] = torch.cat([keywords["logits"]] * 2, dim=1)[:, : keywords["logits"].shape[1]]
        torch.library.opcheck(operator(name), schema_arguments(name, keywords))


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("name", ["logit_gradient", "gumbel_perturb"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("v", [1, 37, 38, 39, 40])
def test_rows_of_results_start_at_16_byte_boundaries(device, name, dtype, v):
    skip_fp64_on_cuda(device, dtype)
    result = call(name, arguments(name, device, dtype, v=v))
    assert result.shape == (N, v)
    assert result.data_ptr() % 16 == 0
    assert result.stride(0) * result.element_size() % 16 == 0
    assert result.stride(0) < v + 16 // result.element_size()


def guided_reward(logits, embedding, hard, temperature):
    """The differentiable operators together, as the driver uses them."""
    statistics = logit_statistics(logits, temperature)
    weight = (statistics.entropy / 5).detach()
    output, _ = relaxed_embedding(
        logits, embedding, temperature, hard_tokens=hard, weight=weight, logsumexp=statistics.logsumexp.detach()
    )
    return output.tanh().sum() + statistics.tempered_entropy.sum() + statistics.logsumexp.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_the_differentiable_operators(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(guided_reward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, v in ((3, 17), (4, 23), (6, 40)) if dynamic else ((3, 17),):
        embedding = random_embedding(v, 6, device=device)
        hard = torch.arange(n, device=device) % v
        eager, traced = (random_logits(n, v, device=device).requires_grad_() for _ in range(2))
        expected, got = guided_reward(eager, embedding, hard, 0.7), compiled(traced, embedding, hard, 0.7)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_compile_of_every_operator(device, name):
    """In-place operators included: fullgraph, through functionalisation, equal to eager."""
    torch.compiler.reset()
    compiled = torch.compile(lambda keywords: call(name, keywords), fullgraph=True, backend="aot_eager")
    traced, eager = arguments(name, device), arguments(name, device)
    got, expected = compiled(traced), call(name, eager)
    if expected is not None:
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
            assert_same(a, b, name)
    for key in WRITTEN.get(name, []):
        assert_same(traced[key], eager[key], key)


@pytest.mark.slow
@pytest.mark.parametrize("forbidden", [None, [4, 1, 4]])
def test_compile_with_inductor(device, forbidden):
    torch.compiler.reset()
    logits, keys = random_logits(3, 17, device=device), random_keys(3, device)
    ids = None if forbidden is None else torch.tensor(forbidden, dtype=torch.int32, device=device)

    def draw(logits, keys):
        sample = sample_tokens(logits * 2, keys, 0.7, 0.9, forbidden=ids)
        return sample.token + 1, sample.probability * 2

    got, expected = torch.compile(draw, fullgraph=True)(logits, keys), draw(logits, keys)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


WITHOUT_PRODUCT = ("logit_statistics", "sample_tokens", "gumbel_perturb", "commit_")


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_bitwise_deterministic(device, name, dtype):
    """Run to run; and, but for the matrix products of BLAS, whatever the number of CPU threads. Large enough for
    any splitting to start."""
    skip_fp64_on_cuda(device, dtype)

    def run():
        keywords = arguments(name, device, dtype, n=7, v=9001, d=72)
        result = call(name, keywords)
        results = () if result is None else result if isinstance(result, tuple) else (result,)
        return (*results, *(keywords[key] for key in WRITTEN.get(name, [])))

    threads = torch.get_num_threads()
    expected = run()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            if name not in WITHOUT_PRODUCT:
                expected = run()
            for _ in range(2):
                for a, b in zip(run(), expected, strict=True):
                    assert_same(a, b, f"{name} on {count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_backward_is_bitwise_deterministic(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    given = backward_arguments(device, dtype)
    expected = operator("logit_statistics_backward")(*given)
    for _ in range(3):
        assert_same(operator("logit_statistics_backward")(*given), expected)


def test_results_do_not_require_grad_without_need(device):
    logits = random_logits(2, 9, device=device)
    assert not any(t.requires_grad for t in logit_statistics(logits))
    assert not any(t.requires_grad for t in sample_tokens(logits, random_keys(2, device)))
    assert reference.Statistics._fields == logit_statistics(logits)._fields
