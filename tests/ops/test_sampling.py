"""Operator 1 with a draw: what is drawn, and the probability, margin and entropy of the filtered distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrgi_ext import logit_statistics, philox, reference, sample_tokens
from support.helpers import (
    LARGE_VOCABULARY,
    LOGIT_DTYPES,
    assert_accurate,
    assert_same,
    entropy_rounding,
    layouts,
    position_keys,
    random_keys,
    random_logits,
    skip_fp64_on_cuda,
)

FILTERED = ("probability", "margin", "filtered_entropy")


def boundary(z: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """bool [N, V]: ids whose mass ahead is so near top_p of the total that fp32 masses may fall on either side."""
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    ranked = z.gather(1, order)
    mass = ((ranked - ranked[:, :1]) / temperature).exp()
    ahead = (mass.cumsum(1) - mass) / mass.sum(1, keepdim=True)
    near = ((ahead - top_p).abs() < 1e-5) & (0 < top_p < 1)
    return torch.zeros_like(near).scatter(1, order, near)


def check(logits, keys, temperature, top_p=1.0, top_k=None, forbidden=None, slack=0.0) -> reference.Sample:
    """Against the fp64 reference: exactly in fp64, up to roundings and the fp32 boundary otherwise."""
    got = sample_tokens(logits, keys, temperature, top_p, top_k, forbidden)
    z, keys = logits.cpu().double() + 0.0, keys.cpu()
    host = None if forbidden is None else forbidden.cpu()
    exact = reference.sample_tokens(z, keys, temperature, top_p, top_k, host)
    plain = reference.sample_tokens(logits.cpu(), keys, temperature, top_p, top_k, host)
    assert_same(got.argmax, exact.argmax, "argmax")
    rounding = entropy_rounding(got.entropy) + slack * math.log(z.shape[1] + 1)
    for name in ("logsumexp", "entropy", "tempered_entropy"):
        allowed = slack if name == "logsumexp" else rounding
        assert_accurate(*(getattr(s, name) for s in (got, plain, exact)), name, allowed)

    z = z if host is None else z.masked_fill(host, -math.inf)
    kept = reference.kept_by_filter(z, temperature, top_p, top_k)
    near = boundary(z, temperature, top_p)
    if logits.dtype == torch.float64:
        assert_same(got.token, exact.token, "token")
        near = torch.zeros_like(near)
    if top_k is not None:
        near &= z >= z.topk(min(top_k, z.shape[1]), dim=1).values[:, -1:]
    tokens = got.token.cpu()[:, None]
    assert (kept | near).gather(1, tokens).all(), "a token outside the filter was drawn"
    scores = (z - z.amax(1, keepdim=True)) / temperature
    scores += philox.gumbel(keys, torch.arange(z.shape[1]))
    best = scores.masked_fill(~kept | near, -math.inf).amax(1)
    assert (scores.gather(1, tokens)[:, 0] >= best - 1e-4).all(), "a kept token with a higher score was passed over"

    # what the boundary ids may add to or take from the filtered distribution
    q = torch.softmax((z - z.amax(1, keepdim=True)) / temperature, dim=1)
    doubt = (q * near).sum(1) / (q * (kept & ~near)).sum(1).clamp(min=1e-300)
    slack += float(doubt.max()) if doubt.numel() else 0.0
    same = got.token.cpu() == exact.token
    exact_probability = (q * kept).gather(1, tokens)[:, 0] / (q * kept).sum(1)
    exact_probability = torch.where(same, exact.probability, exact_probability)
    plain_probability = torch.where(
        plain.token == got.token.cpu(), plain.probability, exact_probability.to(plain.margin.dtype)
    )
    sure = ~near.gather(1, tokens)[:, 0]
    assert_accurate(got.probability.cpu()[sure], plain_probability[sure], exact_probability[sure], "probability", slack)
    assert_accurate(got.margin, plain.margin, exact.margin, "margin", slack + rounding)
    entropy_slack = slack * (2 + 2 * math.log(z.shape[1] + 1)) + rounding
    assert_accurate(*(s.filtered_entropy for s in (got, plain, exact)), "filtered_entropy", entropy_slack)
    return got


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("top_k", [None, 1, 5, 10**9])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 0.9999999, 1.0])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_accuracy(device, dtype, top_p, top_k):
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(33, 203, dtype, device, scale=2.0), random_keys(33, device)
    got = check(logits, keys, 0.7, top_p, top_k)
    if top_p == 0.0 or (top_k == 1 and dtype in (torch.float32, torch.float64)):
        assert_same(got.token, got.argmax, "only the first survives")
        assert (got.probability == 1).all()
        assert (got.margin == 1).all()
        assert (got.filtered_entropy == 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_temperatures(device, dtype, temperature):
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(29, 1003, dtype, device), random_keys(29, device)
    check(logits, keys, temperature, 0.9)
    check(logits, keys, temperature, 0.95, 50)


@pytest.mark.parametrize("v", [1, 2, 3, 7, 9, 33, 257, 4097])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_vocabulary_sizes(device, dtype, v):
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(3, v, dtype, device, scale=3.0), random_keys(3, device)
    forbidden = torch.arange(v, device=device) % 5 == 3
    check(logits, keys, 0.7, 0.95, None, forbidden)
    check(logits, keys, 0.9, 0.95, 50)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_large_vocabulary(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(2, LARGE_VOCABULARY, dtype, device, scale=3.0), random_keys(2, device)
    check(logits, keys, 0.7, 0.95, 5000, torch.arange(LARGE_VOCABULARY, device=device) % 5 == 3)


@settings(max_examples=100)
@given(
    v=st.one_of(st.integers(1, 70), st.integers(4000, 13_000)),
    levels=st.lists(st.sampled_from([-math.inf, -90.0, -3.0, -1.0, -0.0, 0.0, 0.25, 5.0]), min_size=1, max_size=4),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 10.0]),
    top_p=st.one_of(st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.floats(0, 1)),
    top_k=st.one_of(st.none(), st.integers(1, 80), st.integers(1, 13_000)),
    forbid=st.sampled_from([0, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_few_levels_many_ties(device, v, levels, temperature, top_p, top_k, forbid, dtype, seed):
    """Rows of a few values, so that the boundaries of top-p and top-k fall among ties, over many blocks."""
    if device != "cpu":
        dtype = torch.float32
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(levels), (3, v), generator=generator)
    logits = torch.tensor(levels, dtype=dtype)[pick]
    logits[:, v // 2] = 1.0  # never forbidden: something can be drawn
    forbidden = torch.rand(v, generator=generator) < forbid / 10
    forbidden[v // 2] = False
    # Equal addends round the same way: PyTorch's cascaded sums are better than twice as good there.
    slack = 4e-6 if dtype == torch.float32 else 0.0
    check(logits.to(device), random_keys(3, device, seed), temperature, top_p, top_k, forbidden.to(device), slack)


def test_vocabulary_of_one(device):
    got = sample_tokens(torch.full((3, 1), -7.0, device=device), random_keys(3, device), 0.7, 0.5, 3)
    assert got.token.tolist() == [0, 0, 0]
    assert got.probability.tolist() == got.margin.tolist() == [1, 1, 1]
    assert got.filtered_entropy.tolist() == got.entropy.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_layouts(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(5, 1003, dtype, device), random_keys(5, device)
    expected = sample_tokens(logits, keys, 0.7, 0.9, 40)
    for layout, view in layouts(logits).items():
        got = sample_tokens(view, keys, 0.7, 0.9, 40)
        assert_same(got.token, expected.token, layout)
        for name in FILTERED:
            assert_accurate(getattr(got, name), getattr(expected, name), getattr(expected, name), layout)


def test_strided_keys(device):
    logits, keys = random_logits(6, 100, device=device), random_keys(6, device)
    wide = torch.full((12, 8), -1, dtype=torch.int64, device=device)
    wide[::2, ::2] = keys
    expected = sample_tokens(logits, keys, 0.7).token
    assert_same(sample_tokens(logits, wide[::2, ::2].contiguous(), 0.7).token, expected)
    try:
        got = sample_tokens(logits, wide[::2, ::2], 0.7)
    except RuntimeError as error:
        assert "keys" in str(error)  # noqa: PT017 (refusing is as good as reading the strides)
    else:
        assert_same(got.token, expected)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_statistics_are_those_without_a_draw(device, dtype):
    """Forbidden ids and the filter touch the draw only."""
    skip_fp64_on_cuda(device, dtype)
    logits = random_logits(5, 300, dtype, device)
    logits[:, 7] = 30.0  # the maximum, forbidden
    forbidden = torch.zeros(300, dtype=torch.bool, device=device)
    forbidden[7] = True
    got = check(logits, random_keys(5, device), 0.7, 0.9, 3, forbidden)
    assert (got.argmax == 7).all()
    assert (got.token != 7).all()
    for name, expected in logit_statistics(logits, 0.7)._asdict().items():
        if name == "argmax":
            assert_same(got.argmax, expected)
        else:
            assert_accurate(getattr(got, name), expected, expected, name, entropy_rounding(got.entropy))


@pytest.mark.parametrize("v", [9, 1003])
@pytest.mark.parametrize("allowed", [0, -1])
def test_one_id_allowed(device, v, allowed):
    logits = random_logits(4, v, device=device)
    logits[:, allowed] = -300.0  # e^(z - max) underflows unless the maximum is that of the allowed ids
    forbidden = torch.ones(v, dtype=torch.bool, device=device)
    forbidden[allowed] = False
    got = sample_tokens(logits, random_keys(4, device), 0.7, 0.9, None, forbidden)
    assert (got.token == allowed % v).all()
    assert (got.probability == 1).all()
    assert (got.margin == 1).all()
    assert (got.filtered_entropy == 0).all()


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_masked_entries_are_never_drawn(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    n, v = 64, 70
    logits = torch.full((n, v), -math.inf, dtype=dtype, device=device)
    logits[:, [3, 64, 69]] = torch.tensor([0.0, 1.0, 0.5], dtype=dtype, device=device)
    for top_p, top_k in ((1.0, None), (0.999, None), (1.0, 50)):
        got = check(logits, random_keys(n, device), 0.7, top_p, top_k)
        assert set(got.token.tolist()) == {3, 64, 69}


def drawn(logits, top_p, top_k=None, n=400, temperature=1.0) -> list[int]:
    """The ids that n draws of one row of logits ever give."""
    rows = logits[None, :].expand(n, -1)
    got = sample_tokens(rows, position_keys(n, logits.device.type), temperature, top_p, top_k)
    return sorted(set(got.token.tolist()))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 10.0])
def test_exact_ties_at_the_nucleus_boundary(device, dtype, temperature):
    """Eight equal ids: the masses ahead are exactly 0, 1/8, ... 7/8; <= keeps the id that reaches top_p."""
    skip_fp64_on_cuda(device, dtype)
    equal = torch.full((8,), 2.5, dtype=dtype, device=device)
    for top_p, kept in ((0.0, 1), (0.1249, 1), (0.125, 2), (0.375, 4), (0.4999, 4), (0.5, 5), (0.875, 8), (1.0, 8)):
        assert drawn(equal, top_p, temperature=temperature) == list(range(kept)), top_p
        n = 50
        got = sample_tokens(equal.expand(n, -1), position_keys(n, device), temperature, top_p)
        torch.testing.assert_close(got.probability.double(), torch.full_like(got.probability, 1 / kept).double())
        torch.testing.assert_close(got.margin.abs().max().item(), 1.0 if kept == 1 else 0.0)
        torch.testing.assert_close(got.filtered_entropy.mean().item(), math.log(kept), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_ties_scattered_over_a_large_vocabulary(device, dtype):
    """64 equal maxima spread over V, the rest at -inf or of no mass: the kept ones are the first by id."""
    skip_fp64_on_cuda(device, dtype)
    v, temperature = 20_011, 1.0
    ids = torch.arange(64) * 311 + 5
    for rest in (-math.inf, -200.0):
        logits = torch.full((v,), rest, dtype=dtype, device=device)
        logits[ids] = 1.0
        # mass ahead of the j-th is j / 64
        assert drawn(logits, 9 / 64, n=200, temperature=temperature) == ids[:10].tolist()
        assert drawn(logits, 8.99 / 64, n=200, temperature=temperature) == ids[:9].tolist()


def test_negative_and_positive_zero_are_one_value(device):
    """Were -0 ordered below +0, ids 2 and 3 would come first."""
    logits = torch.tensor([-0.0, -0.0, 0.0, 0.0], device=device)
    assert drawn(logits, 0.25) == [0, 1]
    assert drawn(logits, 0.0) == [0]
    assert drawn(logits, 1.0, top_k=1) == [0, 1, 2, 3]
    got = sample_tokens(logits[None], position_keys(1, device), 1.0, 0.5)
    assert got.argmax.tolist() == [0]


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_top_k_keeps_ties_but_revives_nothing(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0], dtype=dtype, device=device)
    assert drawn(logits, 1.0, 1) == [0]
    assert drawn(logits, 1.0, 2) == [0, 1, 2, 3]  # ties of the 2nd largest
    assert drawn(logits, 1.0, 4) == [0, 1, 2, 3]
    assert drawn(logits, 1.0, 5) == [0, 1, 2, 3, 4]
    assert drawn(logits, 1.0, 6) == [0, 1, 2, 3, 4]
    assert drawn(logits, 0.6, 2) == [0, 1]  # masses ahead 0, .51, .69, .88: top-p first, by id among ties


@pytest.mark.parametrize("v", [64, 3001])
def test_top_k_at_every_rank(device, v):
    """A permuted ladder: the k-th largest is known, and each k adds one id."""
    order = torch.randperm(v, generator=torch.Generator().manual_seed(3))
    logits = torch.empty(1, v)
    logits[0, order] = torch.linspace(0, -1, v)  # order[k - 1] is the k-th largest
    for k in (1, 2, 3, 31, 32, 33, 63, 64):
        rows = logits.expand(300, -1).to(device)
        tokens = sample_tokens(rows, position_keys(300, device), 10.0, 1.0, k).token.cpu()
        assert set(tokens.tolist()) <= set(order[:k].tolist())
        got = sample_tokens(rows[:1], position_keys(1, device), 10.0, 1.0, k)
        q = torch.softmax(torch.linspace(0, -1, v, dtype=torch.float64)[:k] / 10.0, 0)
        entropy = float(-(q * q.log()).sum())
        assert got.filtered_entropy.item() == pytest.approx(entropy, rel=1e-5, abs=1e-7), k


def test_the_first_id_is_kept_whatever_its_mass(device):
    assert drawn(torch.tensor([0.0, 9.0, 0.0], device=device), 0.0) == [1]
    assert drawn(torch.tensor([0.0, 9.0, 0.0], device=device), 0.5) == [1]


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_no_rows(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    got = sample_tokens(torch.empty(0, 9, dtype=dtype, device=device), random_keys(0, device), 0.7, 0.9, 3)
    assert [tuple(t.shape) for t in got] == [(0,)] * 8


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("count", [0, 1, 60, 299])
def test_forbidden_as_a_list_of_ids(device, dtype, count):
    """In any order and with repetitions: the mask that names the same ids gives the same bits."""
    skip_fp64_on_cuda(device, dtype)
    logits, keys = random_logits(9, 300, dtype, device, scale=2.0), random_keys(9, device)
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(count))[:count]
    mask = torch.zeros(300, dtype=torch.bool)
    mask[ids] = True
    repeated = torch.cat([ids, ids[: count // 2]]).flip(0).int().to(device)
    for top_p, top_k in ((0.9, None), (1.0, 5), (0.5, 40)):
        expected = sample_tokens(logits, keys, 0.7, top_p, top_k, mask.to(device))
        got = sample_tokens(logits, keys, 0.7, top_p, top_k, repeated)
        plain = reference.sample_tokens(logits.cpu(), keys.cpu(), 0.7, top_p, top_k, repeated.cpu())
        same = reference.sample_tokens(logits.cpu(), keys.cpu(), 0.7, top_p, top_k, mask)
        for name in reference.Sample._fields:
            assert_same(getattr(got, name), getattr(expected, name), name)
            assert_same(getattr(plain, name), getattr(same, name), f"reference, {name}")
    assert count == 0 or not torch.isin(got.token.cpu(), ids).any()


def test_a_column_of_a_matrix_as_the_list_of_forbidden_ids(device):
    logits, keys = random_logits(5, 50, device=device), random_keys(5, device)
    ids = torch.tensor([[3, 0], [41, 1], [7, 2]], dtype=torch.int32, device=device)
    expected = sample_tokens(logits, keys, forbidden=ids[:, 0].clone())
    for a, b in zip(sample_tokens(logits, keys, forbidden=ids[:, 0]), expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("poison", ["nan", "+inf", "nothing finite", "all forbidden"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_bad_rows(device, dtype, poison):
    skip_fp64_on_cuda(device, dtype)
    good, keys = random_logits(4, 300, dtype, device), random_keys(4, device)
    forbidden = torch.arange(300, device=device) % 2 == 0
    logits = good.clone()
    if poison == "nothing finite":
        logits[2] = -math.inf
    elif poison == "all forbidden":
        logits[2, 1::2] = -math.inf
    else:
        logits[2, 131] = math.nan if poison == "nan" else math.inf
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = (keys, 0.7, 0.9, None, forbidden)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"row 2\b"):
            sample_tokens(logits, *arguments, flag)
        return
    got, expected = sample_tokens(logits, *arguments, flag), sample_tokens(good, *arguments)
    drawable = poison == "all forbidden"
    assert flag.item() == (2 if drawable else 1)
    assert got.token[2] == -1
    assert (got.argmax[2] >= 0) == drawable
    for name in ("logsumexp", "entropy", "tempered_entropy"):
        assert torch.isnan(getattr(got, name)[2]) == (not drawable), name
    for name in FILTERED:
        assert torch.isnan(getattr(got, name)[2]), name
    others = [0, 1, 3]
    for name, a, b in zip(reference.Sample._fields, got, expected, strict=True):
        assert_same(a[others], b[others], name)


def test_error_flag_collects_bits(device):
    """Bits are ORed in, and a good batch clears nothing."""
    flag = torch.full((1,), 4, dtype=torch.int32, device=device)
    logits, keys = random_logits(3, 20, device=device), random_keys(3, device)
    sample_tokens(logits, keys, error_flag=flag)
    assert flag.item() == 4
    if device == "cpu":
        return
    logits[0, 0] = math.nan
    forbidden = torch.ones(20, dtype=torch.bool, device=device)
    sample_tokens(logits, keys, forbidden=forbidden, error_flag=flag)
    assert flag.item() == 7


@given(
    n=st.integers(2, 9),
    v=st.integers(1, 90),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    top_k=st.sampled_from([None, 7]),
    seed=st.integers(0, 500),
)
def test_draws_depend_on_their_own_row_only(device, n, v, top_p, top_k, seed):
    """Not on the batch, the order of its rows, or how it is split."""
    logits, keys = random_logits(n, v, device=device, seed=seed), random_keys(n, device, seed=seed)

    def draw(rows):
        return sample_tokens(logits[rows], keys[rows], 0.7, top_p, top_k)

    whole = draw(list(range(n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = 1 + seed % (n - 1)
    parts = [draw(list(range(cut))), draw(list(range(cut, n)))]
    singles = [draw([i]) for i in range(n)]
    for name in ("token", *FILTERED):
        expected = getattr(whole, name)
        compare = assert_same if name == "token" else torch.testing.assert_close
        compare(getattr(draw(order), name), expected[order])
        compare(torch.cat([getattr(part, name) for part in parts]), expected)
        compare(torch.cat([getattr(single, name) for single in singles]), expected)


def test_draws_of_a_large_vocabulary_do_not_depend_on_the_batch(device):
    """Few rows may be split over the vocabulary, many are not: same tokens."""
    logits = random_logits(24, 30_522, device=device)
    keys = random_keys(24, device)
    whole = sample_tokens(logits, keys, 0.9, 0.97, 5000).token
    singles = torch.cat([sample_tokens(logits[i : i + 1], keys[i : i + 1], 0.9, 0.97, 5000).token for i in range(24)])
    assert_same(singles, whole)


@given(v=st.integers(2, 60), top_p=st.sampled_from([0.3, 0.9, 1.0]), seed=st.integers(0, 1000))
def test_filtered_statistics_are_permutation_equivariant(device, v, top_p, seed):
    """Distinct logits, so that no tie is broken by the id. (The token itself is drawn by id.)"""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randperm(v, generator=generator).float() / 5)[None].to(device)
    order = torch.randperm(v, generator=generator).to(device)
    a, b = (sample_tokens(z, position_keys(1, device), 0.7, top_p) for z in (logits, logits[:, order]))
    torch.testing.assert_close(a.margin, b.margin, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.filtered_entropy, b.filtered_entropy, rtol=1e-5, atol=1e-6)


@given(v=st.integers(1, 60), shift=st.integers(-50, 50), seed=st.integers(0, 1000))
def test_draws_are_shift_invariant(device, v, shift, seed):
    logits = ((random_logits(3, v, seed=seed) * 4).round() / 4).to(device)
    keys = random_keys(3, device, seed=seed)
    a, b = (sample_tokens(z, keys, 0.7, 0.9) for z in (logits, logits + shift))
    for name in ("token", *FILTERED):
        assert_same(getattr(a, name), getattr(b, name), name)


def test_nothing_is_written_to_the_inputs(device):
    logits, keys = random_logits(3, 50, device=device), random_keys(3, device)
    forbidden = torch.arange(50, device=device) % 3 == 0
    before = [t.clone() for t in (logits, keys, forbidden)]
    sample_tokens(logits, keys, 0.7, 0.9, 3, forbidden)
    for a, b in zip((logits, keys, forbidden), before, strict=True):
        assert_same(a, b)
