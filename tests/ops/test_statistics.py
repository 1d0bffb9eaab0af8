"""Operator 1 without a draw: logsumexp, both entropies, argmax, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrgi_ext import logit_statistics, reference
from support.helpers import (
    LARGE_VOCABULARY,
    LOGIT_DTYPES,
    assert_accurate,
    assert_same,
    double,
    entropy_rounding,
    layouts,
    random_logits,
    skip_fp64_on_cuda,
)

FIELDS = reference.Statistics._fields


def check(logits: torch.Tensor, temperature: float) -> None:
    got = logit_statistics(logits, temperature)
    plain = reference.logit_statistics(logits, temperature)
    exact = reference.logit_statistics(logits.double().cpu(), temperature)
    assert_same(got.argmax, exact.argmax, "argmax")
    for name in FIELDS[:3]:
        assert getattr(got, name).device == logits.device
        # entropies of peaked rows are differences of numbers near 1: an error of some 1e-7 nats is no error
        slack = 0.0 if name == "logsumexp" else entropy_rounding(got.entropy)
        assert_accurate(getattr(got, name), getattr(plain, name), getattr(exact, name), name, slack)


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 10.0])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_accuracy(device, dtype, temperature):
    skip_fp64_on_cuda(device, dtype)
    check(random_logits(67, 1003, dtype, device), temperature)


@pytest.mark.parametrize("v", [1, 2, 3, 7, 8, 9, 31, 33, 255, 257, 4097, LARGE_VOCABULARY])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_vocabulary_sizes(device, dtype, v):
    skip_fp64_on_cuda(device, dtype)
    check(random_logits(3, v, dtype, device, scale=2.0), 0.7)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_flat_and_peaked_rows(device, dtype):
    """All equal, one certain token, a rising ramp (a new maximum at every id) and a falling one."""
    skip_fp64_on_cuda(device, dtype)
    v = 5003
    ramp = torch.linspace(-60, 60, v, dtype=torch.float64)
    one_hot = torch.where(torch.arange(v) == 4999, 200.0, 0.0).double()
    rows = torch.stack([torch.full((v,), 5.0, dtype=torch.float64), one_hot, ramp, ramp.flip(0), -one_hot])
    for temperature in (0.05, 1.0, 10.0):
        check(rows.to(dtype).to(device), temperature)


def test_large_flat_vocabulary_entropy(device):
    """Entropy log V is summed from 151,937 terms of 1e-4: naive fp32 accumulation loses it."""
    got = logit_statistics(torch.full((2, LARGE_VOCABULARY), -3.25, device=device), 0.7)
    expected = torch.full((2,), math.log(LARGE_VOCABULARY))
    for name in ("entropy", "tempered_entropy"):
        torch.testing.assert_close(getattr(got, name).cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("v", [4000, LARGE_VOCABULARY])
def test_sums_of_equal_addends(device, v):
    """One likely token and a flat rest: thousands of equal small terms join a sum near 1 and all round the same way.
    Added one by one in fp32 they are off by 1e-5 (rest times number of terms in a lane times 2^-24)."""
    logits = torch.full((1, v), -90.0, device=device)
    logits[0, v // 2] = 1.0
    got, exact = (logit_statistics(z, 10.0) for z in (logits, logits.cpu().double()))
    for name in FIELDS[:3]:
        a, b = getattr(got, name).cpu().double(), getattr(exact, name)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_masked_entries(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(6, 300, dtype, device)
    logits[0, :299] = -math.inf  # one id left, the last
    logits[1, 1:] = -math.inf
    logits[2, ::2] = -math.inf
    logits[3, :150] = -math.inf  # whole leading blocks: the running maximum starts at -inf
    logits[4, :150] = torch.finfo(dtype).min
    check(logits, 0.7)
    got = logit_statistics(logits, 0.7)
    assert got.argmax[0] == 299
    assert got.argmax[1] == 0
    assert got.entropy[:2].abs().max() == 0
    assert got.tempered_entropy[:2].abs().max() == 0


@pytest.mark.parametrize("low", ["-inf", "finfo.min"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_a_masked_half_of_a_large_vocabulary(device, dtype, low):
    """Whole blocks that a kernel works on hold nothing but the mask; finfo.min / 0.7 overflows in fp32."""
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(4, 30_522, dtype, device)
    low = -math.inf if low == "-inf" else torch.finfo(dtype).min
    logits[0, :20_000], logits[1, 10_000:], logits[2, 5_000:25_000] = low, low, low
    logits[3, :-1] = low
    for temperature in (0.7, 1.0):
        check(logits, temperature)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_layouts(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(5, 1003, dtype, device)
    expected = logit_statistics(logits, 0.7)
    for layout, view in layouts(logits).items():
        for name, a, b in zip(FIELDS, logit_statistics(view, 0.7), expected, strict=True):
            if name == "argmax":
                assert_same(a, b, layout)
            else:  # an unaligned head may be summed in another order
                assert_accurate(a, b, b, f"{layout}: {name}")


def test_broadcast_rows(device):
    row = random_logits(1, 515, device=device)
    got = logit_statistics(row.expand(4, -1), 0.7)
    for name, a, b in zip(FIELDS, got, logit_statistics(row.repeat(4, 1), 0.7), strict=True):
        assert_same(a, b, name)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_no_rows(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    got = logit_statistics(torch.empty(0, 17, dtype=dtype, device=device), 0.7)
    assert [tuple(t.shape) for t in got] == [(0,)] * 4
    assert [t.dtype for t in got] == [reference.accumulator_dtype(got.entropy)] * 3 + [torch.int64]


def test_argmax_is_the_first_of_equals(device):
    for v in (5, 64, 1003):
        logits = torch.zeros(3, v, device=device)
        logits[0, [v // 2, v - 1]] = 1.0
        logits[1] = -0.0
        logits[1, v - 1] = 0.0  # +0 does not beat the earlier -0
        assert logit_statistics(logits).argmax.tolist() == [v // 2, 0, 0]


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("poison", ["nan", "+inf", "nothing finite"])
@pytest.mark.parametrize("column", [0, 130, 256])
def test_bad_rows(device, dtype, poison, column):
    skip_fp64_on_cuda(device, dtype)
    good = random_logits(4, 257, dtype, device)
    logits = good.clone()
    if poison == "nothing finite":
        logits[2] = -math.inf
    else:
        logits[2, column] = math.nan if poison == "nan" else math.inf
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"row 2\b"):
            logit_statistics(logits, 0.7)
        return
    got, expected = logit_statistics(logits, 0.7), logit_statistics(good, 0.7)
    assert got.argmax[2] == -1
    for name, a, b in zip(FIELDS, got, expected, strict=True):
        if name != "argmax":
            assert torch.isnan(a[2]), name
        others = [0, 1, 3]
        assert_same(a[others], b[others], name)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_entropy_is_finite_where_scores_overflow(device, temperature):
    """z / temperature may overflow, (z - max) / temperature may not: masks of finfo.min are common."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((2, 8), lowest, device=device)
    logits[1, 3] = 0.0
    got = logit_statistics(logits, temperature)
    expected = torch.tensor([math.log(8), 0.0])
    torch.testing.assert_close(got.entropy.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.tempered_entropy.cpu(), expected, rtol=1e-6, atol=0)


@given(
    v=st.integers(1, 70),
    shift=st.integers(-64, 64),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_shift_invariance(device, v, shift, temperature, seed):
    """Quarter-integer logits, so that the shift is exact: entropies stay, logsumexp moves by shift / tau."""
    logits = (random_logits(3, v, seed=seed) * 4).round() / 4
    a = logit_statistics(logits.to(device), temperature)
    b = logit_statistics((logits + shift).to(device), temperature)
    assert_same(a.argmax, b.argmax)
    size = 100 / temperature  # |z / tau| before the subtraction of the maximum
    for name in ("entropy", "tempered_entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=2e-7 * size, msg=name)
    torch.testing.assert_close(a.logsumexp + shift / temperature, b.logsumexp, rtol=1e-6, atol=1e-6 * size)


@given(v=st.integers(1, 200), temperature=st.sampled_from([0.1, 0.7, 3.0]), seed=st.integers(0, 1000))
def test_permutation_equivariance(device, v, temperature, seed):
    logits = random_logits(2, v, seed=seed).to(device)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed)).to(device)
    a, b = logit_statistics(logits, temperature), logit_statistics(logits[:, order], temperature)
    assert_same(order[b.argmax], a.argmax)
    for name in FIELDS[:3]:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("field", FIELDS[:3])
def test_gradcheck(field, temperature):
    logits = random_logits(4, 9, torch.float64, scale=2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: getattr(logit_statistics(z, temperature), field), logits)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradient_accuracy(device, dtype, temperature):
    """All three gradients at once, through the strided, broadcast gradients that autograd really sends."""
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(9, 517, dtype, device)
    logits[0, 3:40] = -math.inf
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def gradient(function, z):
        z = z.detach().clone().requires_grad_()
        terms = function(z, temperature)[:3]
        sum(weights[i].item() * terms[i].sum() for i in range(3)).backward()
        return z.grad

    got = gradient(logit_statistics, logits)
    exact = gradient(reference.logit_statistics, logits.double().cpu())
    assert got[0, 3:40].abs().max() == 0
    # PyTorch's own derivative of the reference meets -inf * 0 = NaN in the masked row: finite rows set the bar
    plain = exact.clone().to(dtype)
    plain[1:] = gradient(reference.logit_statistics, logits[1:]).cpu()
    finite = torch.isfinite(exact)
    assert torch.isfinite(got).all()
    assert_accurate(*(torch.where(finite, t.cpu(), 0) for t in (got, plain, exact)), "gradient")


def test_gradient_of_masked_entries_is_zero_and_the_rest_that_of_the_reduced_row(device):
    logits = random_logits(3, 40, device=device)
    masked = logits.clone()
    masked[:, 1::2] = -math.inf
    for field in FIELDS[:3]:
        a, b = masked.clone().requires_grad_(), logits[:, ::2].clone().requires_grad_()
        getattr(logit_statistics(a, 0.7), field).sum().backward()
        getattr(logit_statistics(b, 0.7), field).sum().backward()
        assert a.grad[:, 1::2].abs().max() == 0, field
        torch.testing.assert_close(a.grad[:, ::2], b.grad, rtol=1e-5, atol=1e-6, msg=field)


def test_argmax_is_not_differentiable():
    logits = random_logits(2, 5).requires_grad_()
    got = logit_statistics(logits)
    assert [t.requires_grad for t in got] == [True, True, True, False]


def test_gradient_with_strided_logits(device):
    logits = random_logits(4, 33, device=device)
    leaf = logits.clone().requires_grad_()
    logit_statistics(leaf, 0.7).entropy.sum().backward()
    for layout, view in layouts(logits).items():
        view = view.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(logit_statistics(view, 0.7).entropy.sum(), view)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6, msg=layout)


def test_double_backward_does_not_pass_silently():
    logits = random_logits(2, 5, torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(logit_statistics(logits).entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum() + logits.square().sum(), logits)


def test_double_inputs_stay_double():
    got = logit_statistics(random_logits(2, 5, torch.float64))
    assert double(*got)[0].dtype == got.logsumexp.dtype == torch.float64
