"""z + scale * g: the noise of the draws as a matrix, for the Gumbel-softmax estimator."""

from __future__ import annotations

import math

import pytest
import torch

from entrgi_ext import gumbel_perturb, logit_statistics, philox, reference, relaxed_embedding, sample_tokens
from support.helpers import (
    LARGE_VOCABULARY,
    LOGIT_DTYPES,
    assert_accurate,
    assert_same,
    layouts,
    position_keys,
    random_embedding,
    random_keys,
    random_logits,
    relative_l2,
    skip_fp64_on_cuda,
)

# (position, id) under seed 7 where the 64-bit uniform lies within 2^-32 of 0 or of 1: an fp32 or 32-bit uniform is 0
# or 1 there, and the noise infinite.
TAILS = [(16_096_385, 424), (4_475_985, 534), (11_004_034, 975), (17_306_148, 674)]


def check(logits: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    got = gumbel_perturb(logits, keys, scale)
    host, host_keys = logits.cpu(), keys.cpu()
    exact = reference.gumbel_perturb(host.double(), host_keys, scale)
    assert_accurate(got, reference.gumbel_perturb(host, host_keys, scale), exact, f"scale {scale}")
    if got.device.type == "cpu":
        z, finite = host.double(), torch.isfinite(exact)
        if got.dtype == torch.float32:  # computed in double and rounded once: half a unit in the last place
            nearest = exact.float().abs()
            allowed = 0.5001 * (torch.nextafter(nearest, torch.tensor(math.inf)) - nearest).double()
        else:
            allowed = 4 * torch.finfo(torch.float64).eps * (z.abs() + scale + (exact - z).abs())
        assert ((got.double() - exact).abs() <= allowed)[finite].all()
    return got


@pytest.mark.parametrize("scale", [1e-3, 0.7, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_accuracy(device, dtype, scale):
    skip_fp64_on_cuda(device, dtype)
    check(random_logits(9, 1003, dtype, device), random_keys(9, device), scale)
    check(torch.zeros(9, 1003, dtype=dtype, device=device), random_keys(9, device), scale)


@pytest.mark.parametrize("v", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 257, 2047, 2049, 4095, 4097])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_vocabulary_sizes(device, dtype, v):
    skip_fp64_on_cuda(device, dtype)
    check(random_logits(3, v, dtype, device), random_keys(3, device), 0.7)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_large_vocabulary(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    check(random_logits(2, LARGE_VOCABULARY, dtype, device), random_keys(2, device), 0.7)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_layouts(device, dtype):
    """Elementwise: not a bit depends on strides and alignment, of logits or of keys."""
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(5, 1003, dtype, device), random_keys(5, device)
    expected = gumbel_perturb(logits, keys, 0.7)
    for layout, view in layouts(logits).items():
        got = gumbel_perturb(view, keys, 0.7)
        assert got.stride() == expected.stride(), layout
        assert_same(got, expected, layout)
    wide = torch.full((10, 8), -1, dtype=torch.int64, device=device)
    wide[::2, :4] = keys
    assert_same(gumbel_perturb(logits, wide[::2, :4], 0.7), expected, "keys")
    same_row = logits[:1].expand(5, -1)
    assert_same(gumbel_perturb(same_row, keys, 0.7), gumbel_perturb(same_row.contiguous(), keys, 0.7), "expanded")


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_no_rows(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    got = gumbel_perturb(torch.empty(0, 9, dtype=dtype, device=device), random_keys(0, device), 0.7)
    assert (got.shape, got.dtype) == ((0, 9), reference.accumulator_dtype(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_keys(device, dtype):
    """All 64 bits of the seed, the low 32 of the other columns, negative ones included."""
    skip_fp64_on_cuda(device, dtype)
    extremes = [0, -1, 1, -2, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    keys = torch.tensor([[x if i == column else 5 for i in range(4)] for column in range(4) for x in extremes])
    keys = keys.to(device)
    noise = check(torch.zeros(len(keys), 40, dtype=dtype, device=device), keys, 1.0)
    seeds = noise[: len(extremes)]
    assert len(torch.unique(seeds, dim=0)) == len(extremes)
    # 0 and 2^32 differ in the seed only; in a counter word they are one
    assert_same(noise[11], noise[19])
    assert not torch.equal(noise[0], noise[8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_tails_of_the_noise(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    keys = torch.tensor([[7, 0, 0, position] for position, _ in TAILS], device=device)
    ids = torch.tensor([id for _, id in TAILS])
    noise = check(torch.zeros(len(TAILS), 1003, dtype=dtype, device=device), keys, 1.0)
    extreme = noise.cpu().gather(1, ids[:, None])[:, 0]
    assert (extreme[:2] > 23).all()
    assert (extreme[2:] < -3.12).all()
    exact = philox.gumbel(keys.cpu(), ids).diagonal()
    assert relative_l2(extreme, exact) < (1e-14 if dtype == torch.float64 else 2e-7)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_the_maximum_is_the_token_drawn(device, dtype, temperature):
    """argmax of z / tau + g and of z + tau g, for the same keys and without a filter; in fp32 a row whose two best
    scores are very near is decided by rounding."""
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(300, 1003, dtype, device), random_keys(300, device)
    token = sample_tokens(logits, keys, temperature).token
    scores = reference.gumbel_perturb(logits.cpu().double() / temperature, keys.cpu(), 1.0)
    best = scores.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > (1e-12 if dtype == torch.float64 else 1e-5)).to(device)
    assert clear.sum() >= (300 if dtype == torch.float64 else 298)
    tempered = logits.to(reference.accumulator_dtype(logits)) / temperature
    for perturbed in (gumbel_perturb(tempered, keys, 1.0), gumbel_perturb(logits, keys, temperature)):
        assert torch.equal(perturbed.argmax(dim=1)[clear], token[clear])
    assert len(set(token.tolist())) > 20, "the noise decides"


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_a_scale_of_zero_adds_nothing(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(3, 99, dtype, device)
    logits[1, ::4] = -math.inf
    assert_same(gumbel_perturb(logits, random_keys(3, device), 0.0), logits.to(reference.accumulator_dtype(logits)))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_masked_entries_stay_masked(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(4, 300, dtype, device)
    logits[:, ::3] = -math.inf
    logits[3] = -math.inf
    logits[3, 299] = -2.0
    got = check(logits, random_keys(4, device), 0.7)
    assert torch.equal(got == -math.inf, logits == -math.inf)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 131, 299])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_bad_rows(device, dtype, poison, place):
    """NaN, +inf, or nothing finite: the CPU names the row; on CUDA it stays as bad as it was, and alone."""
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(4, 300, dtype, device), random_keys(4, device)
    expected = gumbel_perturb(logits, keys, 0.7)
    logits[2, slice(None) if poison == -math.inf else place] = poison
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"logits .* row 2\b"):
            gumbel_perturb(logits, keys, 0.7)
        return
    got = gumbel_perturb(logits, keys, 0.7)
    expected[2, slice(None) if poison == -math.inf else place] = poison
    assert_same(got, expected)
    assert logit_statistics(got).argmax.tolist()[2] == -1


def test_bad_rows_of_a_row_split_over_threads():
    """One row on several threads: NaN in any chunk counts, and a chunk of -inf does not."""
    logits, keys = random_logits(1, 50_000), random_keys(1)
    logits[0, :40_000] = -math.inf
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        gumbel_perturb(logits, keys, 0.7)
        logits[0, 45_000] = math.nan
        with pytest.raises(RuntimeError, match=r"row 0\b"):
            gumbel_perturb(logits, keys, 0.7)
    finally:
        torch.set_num_threads(threads)


def test_noise_depends_on_its_own_key_and_id_only(device):
    """Not on the batch, the order of its rows, nor on V."""
    logits, keys = random_logits(6, 9001, device=device), random_keys(6, device)
    whole = gumbel_perturb(logits, keys, 0.7)
    order = [3, 0, 5, 1, 4, 2]
    assert_same(gumbel_perturb(logits[order], keys[order], 0.7), whole[order])
    for i in range(6):
        assert_same(gumbel_perturb(logits[i : i + 1], keys[i : i + 1], 0.7), whole[i : i + 1])
    for v in (1, 4097, 9000):
        assert_same(gumbel_perturb(logits[:, :v], keys, 0.7), whole[:, :v])


def test_rows_of_other_keys_are_independent(device):
    """Every column of the key counts, and neighbouring positions are uncorrelated."""
    noise = gumbel_perturb(torch.zeros(200, 5000, device=device), position_keys(200, device), 1.0).double()
    mean, variance = float(noise.mean()), float(noise.var())
    n = noise.numel()
    assert abs(mean - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(variance - math.pi**2 / 6) < 5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / n)  # kurtosis 5.4
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = float(((a - mean) * (b - mean)).mean()) / variance
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_inputs_are_left_alone(device):
    logits, keys = random_logits(3, 50, device=device), random_keys(3, device)
    before = [t.clone() for t in (logits, keys)]
    gumbel_perturb(logits, keys, 0.7)
    for a, b in zip((logits, keys), before, strict=True):
        assert_same(a, b)


def test_gumbel_softmax_and_its_gradient(device):
    """The estimator as the driver composes it: softmax((z / tau + g) / lambda) E, differentiable in z through z'."""
    tau, relaxation = 0.7, 0.5
    logits, keys = random_logits(5, 203, device=device), random_keys(5, device)
    embedding, grad = random_embedding(203, 12, device=device), random_embedding(5, 12, device=device, seed=3)
    perturbed = gumbel_perturb(logits, keys, tau).requires_grad_()
    output, _ = relaxed_embedding(perturbed, embedding, tau * relaxation)
    (output * grad).sum().backward()

    z = logits.cpu().double().requires_grad_()
    g = philox.gumbel(keys.cpu(), torch.arange(203))
    expected = ((z / tau + g) / relaxation).softmax(dim=1) @ embedding.cpu().double()
    (expected * grad.cpu().double()).sum().backward()
    assert relative_l2(output.detach(), expected.detach()) < 1e-5
    assert relative_l2(perturbed.grad, z.grad) < 1e-5
