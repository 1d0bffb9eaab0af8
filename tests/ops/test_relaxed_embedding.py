"""Operator 2: (1 - w) softmax(z / tau) E + w E[x], functional and into rows of a given buffer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrgi_ext import logit_statistics, reference, relaxed_embedding, relaxed_embedding_
from support.helpers import (
    DTYPE_PAIRS,
    LARGE_VOCABULARY,
    LOGIT_DTYPES,
    assert_accurate,
    assert_same,
    double,
    layouts,
    logsumexp,
    random_embedding,
    random_logits,
    skip_fp64_on_cuda,
)


def inputs(n, v, d, z_dtype, e_dtype, device, *, scale=4.0, temperature=0.7):
    logits = random_logits(n, v, z_dtype, device, scale=scale)
    embedding = random_embedding(v, d, e_dtype, device)
    lse = logsumexp(logits, temperature)
    generator = torch.Generator().manual_seed(3)
    hard = torch.randint(0, v, (n,), generator=generator).to(device)
    weight = torch.rand(n, generator=generator, dtype=torch.float64).to(lse.dtype).to(device)
    return logits, embedding, lse, hard, weight


def rounding_of_exponent(logits, lse, embedding, temperature) -> float:
    """What rounding z / tau and z / tau - lse in the accumulator dtype may do to the output, in L2.

    It matters where z / tau is large; PyTorch's error may be smaller there by luck (a 16-bit q near 1 is exact).
    """
    epsilon = torch.finfo(lse.dtype).eps
    logits, lse, embedding = double(logits, lse, embedding)
    scores = logits / temperature
    q = (scores - lse[:, None]).exp()
    doubt = torch.where(q > 0, scores.abs() + lse.abs()[:, None], 0.0)
    return 2 * epsilon * float(((q * doubt) @ embedding.abs()).norm())


def check(logits, embedding, lse, hard, weight, temperature):
    got = relaxed_embedding(logits, embedding, temperature, hard_tokens=hard, weight=weight, logsumexp=lse)
    arguments = (logits, lse, embedding, hard, weight)
    exact = reference.relaxed_embedding(*double(*arguments), temperature)
    plain = reference.relaxed_embedding(*arguments, temperature)
    slack = rounding_of_exponent(logits, lse, embedding, temperature)
    for name, a, b, c in zip(("output", "soft"), got, plain, exact, strict=True):
        assert_accurate(a, b, c, name, slack)
    return got


MODES = {"expectation": (False, False), "aps": (True, False), "entrgi": (True, True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_accuracy(device, z_dtype, e_dtype, mode):
    skip_fp64_on_cuda(device, z_dtype)
    logits, embedding, lse, hard, weight = inputs(19, 1003, 72, z_dtype, e_dtype, device)
    has_hard, has_weight = MODES[mode]
    check(logits, embedding, lse, hard if has_hard else None, weight if has_weight else None, 0.7)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_sums_are_accumulated_in_full_precision(device, z_dtype, e_dtype):
    """A flat row of a large vocabulary: q = 6.6e-6 is subnormal in fp16 and a bf16 sum stops growing at 1/256.

    soft is kept in fp32, so it owes nothing to the embedding's rounding: error of a few 1e-3 at 16 bits at most.
    """
    skip_fp64_on_cuda(device, z_dtype)
    v, d = LARGE_VOCABULARY, 8
    logits = random_logits(2, v, z_dtype, device, scale=0.1)
    logits[1] = 1.0
    embedding = (random_embedding(v, d, torch.float32, device) * 0.5 + 1.0).to(e_dtype)
    _, soft = relaxed_embedding(logits, embedding, 0.7)
    exact = torch.softmax(logits.cpu().double() / 0.7, dim=1) @ embedding.cpu().double()
    bound = {torch.float64: 1e-12, torch.float32: 2e-5}.get(e_dtype, 5e-3)
    torch.testing.assert_close(soft.cpu().double(), exact, rtol=bound, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 65])
@pytest.mark.parametrize(("v", "d"), [(1, 1), (2, 3), (9, 8), (33, 17), (515, 130), (1024, 64)])
def test_shapes(device, n, v, d):
    for z_dtype, e_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        check(*inputs(n, v, d, z_dtype, e_dtype, device), 0.7)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2])
def test_large_vocabulary(device, z_dtype, e_dtype):
    check(*inputs(3, LARGE_VOCABULARY, 40, z_dtype, e_dtype, device, scale=2.0), 0.7)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_temperatures(device, z_dtype, e_dtype, temperature):
    skip_fp64_on_cuda(device, z_dtype)
    check(*inputs(7, 301, 24, z_dtype, e_dtype, device, temperature=temperature), temperature)


def test_vocabulary_of_one_gives_its_embedding(device):
    embedding = random_embedding(1, 5, device=device)
    hard = torch.zeros(2, dtype=torch.int64, device=device)
    weight = torch.tensor([0.0, 0.3], device=device)
    output, soft = relaxed_embedding(
        torch.full((2, 1), 3.0, device=device), embedding, 0.7, hard_tokens=hard, weight=weight
    )
    for got in (output, soft):
        torch.testing.assert_close(got, embedding.expand(2, -1), rtol=1e-6, atol=1e-6)


def test_logsumexp_is_computed_where_it_is_not_given(device):
    logits, embedding, *_ = inputs(5, 301, 24, torch.float32, torch.float32, device)
    given_lse = logit_statistics(logits, 0.7).logsumexp
    expected = relaxed_embedding(logits, embedding, 0.7, logsumexp=given_lse)
    for a, b in zip(relaxed_embedding(logits, embedding, 0.7), expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_weights_zero_and_one(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    logits, embedding, lse, hard, weight = inputs(6, 101, 16, z_dtype, e_dtype, device)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    rounding = 4 * torch.finfo(e_dtype).eps

    def output(hard, weight):
        return relaxed_embedding(logits, embedding, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)

    torch.testing.assert_close(output(hard, ones)[0], embedding[hard], rtol=rounding, atol=rounding)
    torch.testing.assert_close(output(hard, None)[0], embedding[hard], rtol=rounding, atol=rounding)
    torch.testing.assert_close(output(hard, zeros)[0], output(None, None)[0], rtol=rounding, atol=rounding)
    for arguments in ((hard, ones), (hard, None), (hard, zeros)):
        assert_same(output(*arguments)[1], output(None, None)[1], "soft is unblended")


def test_invalid_hard_token_gives_a_nan_row(device):
    logits, embedding, lse, hard, weight = inputs(5, 101, 16, torch.float32, torch.bfloat16, device)
    expected = relaxed_embedding(logits, embedding, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)
    broken = hard.clone()
    broken[[1, 4]] = -1
    for w in (weight, torch.zeros_like(weight), None):
        got = relaxed_embedding(logits, embedding, 0.7, hard_tokens=broken, weight=w, logsumexp=lse)
        assert torch.isnan(got[0][[1, 4]]).all()
        assert torch.isfinite(got[0][[0, 2, 3]]).all()
        assert_same(got[1], expected[1], "soft")


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_masked_entries_do_not_contribute(device, z_dtype, e_dtype):
    """Their embeddings are the largest of all by far."""
    skip_fp64_on_cuda(device, z_dtype)
    logits = random_logits(4, 300, z_dtype, device)
    logits[:, ::3] = -math.inf
    embedding = random_embedding(300, 24, e_dtype, device)
    embedding[::3] = 6e4
    check(logits, embedding, logsumexp(logits, 0.7), None, None, 0.7)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_layouts(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    logits, embedding, lse, hard, weight = inputs(5, 303, 20, z_dtype, e_dtype, device)
    expected = relaxed_embedding(logits, embedding, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)
    for name, view in layouts(logits).items():
        for table in (embedding, *layouts(embedding).values()):
            got = relaxed_embedding(view, table, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)
            for a, b in zip(got, expected, strict=True):
                assert_accurate(a, b, b, name)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_no_rows(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    embedding = random_embedding(7, 4, e_dtype, device)
    output, soft = relaxed_embedding(torch.empty(0, 7, dtype=z_dtype, device=device), embedding, 0.7)
    assert (output.shape, output.dtype) == ((0, 4), e_dtype)
    assert (soft.shape, soft.dtype) == ((0, 4), reference.accumulator_dtype(soft))


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("mode", MODES)
def test_into_rows_of_a_buffer(device, z_dtype, e_dtype, mode):
    """Rows -1 are padding: their logits, logsumexp, token and weight are NaN or nonsense and reach nothing."""
    skip_fp64_on_cuda(device, z_dtype)
    n, v, d, r = 7, 203, 24, 11
    logits, embedding, lse, hard, weight = inputs(n, v, d, z_dtype, e_dtype, device)
    has_hard, has_weight = MODES[mode]
    hard, weight = hard if has_hard else None, weight if has_weight else None
    expected = relaxed_embedding(logits, embedding, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)

    rows = torch.tensor([9, -1, 0, 4, -1, 10, 2], device=device)
    used, padding = rows >= 0, rows < 0
    logits[padding], lse[padding] = math.nan, math.nan
    if has_hard:
        hard[padding] = torch.tensor([v, -(2**40)], device=device)
    if has_weight:
        weight[padding] = math.nan
    buffer = torch.full((r, d + 5), 7.0, dtype=e_dtype, device=device)
    output = buffer[:, :d]  # strided, as a slice of the reward model's input would be
    soft = torch.full((n, d), 7.0, dtype=lse.dtype, device=device)
    result = relaxed_embedding_(
        output, soft, logits, lse, embedding, 0.7, hard_tokens=hard, weight=weight, row_index=rows
    )
    assert result is None
    for a, b in ((output[rows[used]], expected[0][used]), (soft[used], expected[1][used])):
        assert_accurate(a, b, b)  # other blocking, other order of summation
    untouched = torch.ones(r, dtype=torch.bool, device=device)
    untouched[rows[used]] = False
    assert (buffer[untouched] == 7).all()
    assert (buffer[:, d:] == 7).all()
    assert not torch.isnan(soft[padding]).any(), "padding rows were read"


def test_in_place_without_rows(device):
    logits, embedding, lse, hard, weight = inputs(5, 101, 16, torch.float32, torch.float32, device)
    expected = relaxed_embedding(logits, embedding, 0.7, hard_tokens=hard, weight=weight, logsumexp=lse)
    output = torch.full((5, 16), math.nan, device=device)
    soft = torch.full((5, 16), math.nan, device=device)
    relaxed_embedding_(output, soft, logits, lse, embedding, 0.7, hard_tokens=hard, weight=weight)
    assert_same(output, expected[0])
    assert_same(soft, expected[1])


def test_only_padding_and_no_rows_at_all(device):
    embedding = random_embedding(9, 4, device=device)
    for n in (0, 3):
        output = torch.full((2, 4), 7.0, device=device)
        soft = torch.full((n, 4), 7.0, device=device)
        logits, lse = torch.full((n, 9), math.nan, device=device), torch.full((n,), math.nan, device=device)
        rows = torch.full((n,), -1, dtype=torch.int64, device=device)
        relaxed_embedding_(output, soft, logits, lse, embedding, 0.7, row_index=rows)
        assert (output == 7).all()


@given(
    n=st.integers(1, 4),
    v=st.integers(1, 40),
    d=st.integers(1, 20),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    seed=st.integers(0, 100),
)
def test_linear_in_the_embedding(device, n, v, d, a, b, seed):
    logits = random_logits(n, v, device=device, seed=seed)
    first, second = (random_embedding(v, d, device=device, seed=seed + i) for i in (1, 2))
    hard = torch.arange(n, device=device) % v
    weight = torch.linspace(0, 1, n, device=device)

    def embed(table):
        return relaxed_embedding(logits, table, 0.7, hard_tokens=hard, weight=weight)

    for got, x, y in zip(embed(a * first + b * second), embed(first), embed(second), strict=True):
        torch.testing.assert_close(got, a * x + b * y, rtol=1e-5, atol=5e-5)


@given(v=st.integers(1, 60), shift=st.integers(-60, 60), seed=st.integers(0, 100))
def test_shift_and_permutation(device, v, shift, seed):
    logits = ((random_logits(2, v, seed=seed) * 4).round() / 4).to(device)
    embedding = random_embedding(v, 6, device=device, seed=seed)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed)).to(device)
    expected = relaxed_embedding(logits, embedding, 0.7)[1]
    torch.testing.assert_close(relaxed_embedding(logits + shift, embedding, 0.7)[1], expected, rtol=1e-4, atol=1e-4)
    permuted = relaxed_embedding(logits[:, order], embedding[order], 0.7)[1]
    torch.testing.assert_close(permuted, expected, rtol=1e-5, atol=1e-5)


# ---- gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradcheck(temperature):
    logits = random_logits(3, 9, torch.float64, scale=2.0).requires_grad_()
    embedding = random_embedding(9, 5, torch.float64)
    hard = torch.tensor([0, 8, 3])
    weight = torch.zeros(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: relaxed_embedding(z, embedding, temperature)[0], logits)
    assert torch.autograd.gradcheck(
        lambda z: relaxed_embedding(z, embedding, temperature, hard_tokens=hard, weight=weight)[0], logits
    )


def gradient(logits, embedding, seed, temperature=0.7, **arguments):
    z = logits.detach().clone().requires_grad_()
    output, _ = relaxed_embedding(z, embedding, temperature, **arguments)
    return torch.autograd.grad(output, z, seed)[0]


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_gradient_is_that_of_the_soft_embedding(device, z_dtype, e_dtype):
    """Whatever the weight: the hard part is straight-through."""
    skip_fp64_on_cuda(device, z_dtype)
    logits, embedding, _, hard, weight = inputs(6, 101, 16, z_dtype, e_dtype, device)
    seed = random_embedding(6, 16, e_dtype, device, seed=5)
    expected = gradient(logits, embedding, seed)
    assert expected.dtype == z_dtype
    assert expected.abs().max() > 0
    for w in (weight, torch.zeros_like(weight), torch.ones_like(weight), None):
        assert_same(gradient(logits, embedding, seed, hard_tokens=hard, weight=w), expected)


def test_gradient_of_every_kind_of_backward(device):
    """A broadcast gradient of stride 0, a transposed one, and only part of the rows used."""
    logits, embedding, *_ = inputs(6, 101, 16, torch.float32, torch.float32, device)

    def exact(function):
        z = logits.detach().clone().requires_grad_()
        return torch.autograd.grad(function((z / 0.7).softmax(dim=1) @ embedding), z)[0]

    def got(function):
        z = logits.detach().clone().requires_grad_()
        return torch.autograd.grad(function(relaxed_embedding(z, embedding, 0.7)[0]), z)[0]

    cotangent = random_logits(16, 6, device=device)
    for function in (
        lambda e: e.sum(),
        lambda e: (e.T * cotangent).sum(),
        lambda e: e[::2, ::3].square().sum(),
        lambda e: e.mean(dim=0).exp().sum(),
    ):
        torch.testing.assert_close(got(function), exact(function), rtol=1e-4, atol=1e-5)


def test_soft_is_not_differentiable_or_rightly_so():
    logits = random_logits(3, 9, torch.float64).requires_grad_()
    embedding = random_embedding(9, 5, torch.float64)
    soft = relaxed_embedding(logits, embedding, 0.7)[1]
    if soft.requires_grad:
        assert torch.autograd.gradcheck(lambda z: relaxed_embedding(z, embedding, 0.7)[1], logits)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_gradient_of_masked_entries_is_zero(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits, embedding, *_ = inputs(4, 101, 16, dtype, dtype, device)
    logits[:, ::4] = -math.inf
    got = gradient(logits, embedding, torch.ones(4, 16, dtype=dtype, device=device))
    assert got[:, ::4].abs().max() == 0
    assert torch.isfinite(got).all()
    assert got.abs().max() > 0


def test_double_backward_does_not_pass_silently():
    """The second derivative is not implemented: an error, never a part of it (here that of the penalty alone)."""
    logits = random_logits(2, 5, torch.float64).requires_grad_()
    embedding = random_embedding(5, 3, torch.float64)
    output = relaxed_embedding(logits, embedding, 0.7)[0]
    (first,) = torch.autograd.grad(output.square().sum(), logits, create_graph=True)
    penalty = logits.square().sum()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum() + penalty, logits)


def test_embedding_that_requires_grad_raises(device):
    logits, embedding, *_ = inputs(2, 9, 4, torch.float32, torch.float32, device)
    embedding.requires_grad_()
    for z in (logits, logits.clone().requires_grad_()):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="embedding"):
            relaxed_embedding(z, embedding, 0.7)
    with torch.no_grad():
        relaxed_embedding(logits, embedding, 0.7)
