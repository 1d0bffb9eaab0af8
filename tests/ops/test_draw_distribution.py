"""Are the draws distributed as they should be? Deterministic keys: these tests pass always or never."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from entrgi_ext import philox, sample_tokens
from support.helpers import LOGIT_DTYPES, position_keys, skip_fp64_on_cuda

DREAM_VOCABULARY = 152_064


def z_score(hits: int, n: int, p: float) -> float:
    return (hits - n * p) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("column", range(4), ids=["seed", "step", "iteration", "position"])
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_chi_square(device, dtype, column):
    """Each word of the key, alone, gives independent draws; a word that is ignored would give one token only."""
    skip_fp64_on_cuda(device, dtype)
    n, temperature = 20_000, 0.7
    keys = torch.full((n, 4), 7, dtype=torch.int64)
    keys[:, column] = torch.arange(n)
    row = torch.tensor([[0.5, -1.0, 0.0, 1.5, -0.25, 1.5, -3.0]], dtype=dtype)
    tokens = sample_tokens(row.expand(n, -1).to(device), keys.to(device), temperature).token
    expected = n * torch.softmax(row[0].double() / temperature, dim=0)
    counts = torch.bincount(tokens.cpu(), minlength=7)
    assert scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


def test_upper_words_of_the_seed_count(device):
    """Seeds that agree in their low 32 bits, and negative ones, are different seeds."""
    n = 4000
    keys = torch.zeros(n, 4, dtype=torch.int64)
    keys[:, 0] = (torch.arange(n) - n // 2) * 2**32 + 5
    tokens = sample_tokens(torch.zeros(n, 8, device=device), keys.to(device)).token
    assert scipy.stats.chisquare(torch.bincount(tokens.cpu(), minlength=8).numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("top_p", "top_k", "kept"), [(0.7, None, 3), (1.0, 3, 3), (0.5, 4, 2)])
def test_chi_square_of_the_filtered_distribution(device, top_p, top_k, kept):
    n = 20_000
    p = torch.tensor([0.4, 0.15, 0.25, 0.06, 0.05, 0.09], dtype=torch.float64)  # rank order 0, 2, 1, 5, 3, 4
    ids = p.argsort(descending=True)[:kept]
    rows = p.log().float()[None].expand(n, -1).to(device)
    tokens = sample_tokens(rows, position_keys(n, device), 1.0, top_p, top_k).token.cpu()
    counts = torch.bincount(tokens, minlength=6)
    assert counts.sum() == counts[ids].sum()
    expected = n * p[ids] / p[ids].sum()
    assert scipy.stats.chisquare(counts[ids].numpy(), expected.numpy()).pvalue > 1e-4


def test_gumbel_noise_to_the_fourth_decimal(device):
    """Two ids whose scores differ by 1e-4 either way: the noise of every key is right to that, and in both tails.

    The chosen positions give id 1 the extreme noise 22.26, 20.20 and -3.11 under seed 7: uniforms of 24 bits end
    at 16.6, and those of 32 bits are off by tens of percent there.
    """
    keys = position_keys(5000, seed=7)
    extreme = torch.tensor([930_526_819, 643_819_032, 1_145_411_878])
    keys[:3, 3] = extreme
    noise = philox.gumbel(keys, torch.arange(2))
    assert [round(g, 2) for g in noise[:3, 1].tolist()] == [22.26, 20.2, -3.11]
    gap = noise[:, 0] - noise[:, 1]
    for offset, token in ((1e-4, 1), (-1e-4, 0)):
        logits = torch.stack([torch.zeros_like(gap), gap + offset], dim=1)
        got = sample_tokens(logits.float().to(device), keys.to(device)).token
        assert (got == token).all(), f"{int((got != token).sum())} keys wrong, first {(got != token).nonzero()[0]}"
        if device == "cpu":
            close = torch.stack([torch.zeros_like(gap), gap + offset * 1e-8], dim=1)
            assert (sample_tokens(close, keys).token == token).all()


def test_rare_tokens_of_a_flat_tail(device):
    """A tail of 152,063 ids with probability 2.6e-7 each (4 % together): its hits, and where in the tail they fall."""
    n = 1500
    tail = 0.04
    logits = torch.full((1, DREAM_VOCABULARY), math.log(tail / (1 - tail) / (DREAM_VOCABULARY - 1)))
    head = 77_777
    logits[0, head] = 0.0
    tokens = sample_tokens(logits.to(device).expand(n, -1), position_keys(n, device)).token.cpu()
    hits = tokens[tokens != head]
    assert abs(z_score(len(hits), n, tail)) < 4
    assert scipy.stats.kstest(hits.numpy() / DREAM_VOCABULARY, "uniform").pvalue > 1e-4


def test_nucleus_boundary_of_a_large_vocabulary(device):
    """Nine ids of 0.1, one of 0.06 that crosses top_p, a long tail of 0.04 that must never be drawn."""
    n = 700
    heads = torch.arange(10) * 15_000 + 31
    p = torch.full((1, DREAM_VOCABULARY), 0.04 / (DREAM_VOCABULARY - 10), dtype=torch.float64)
    p[0, heads] = 0.1
    p[0, heads[4]] = 0.06
    logits = p.log().float().to(device).expand(n, -1)
    got = sample_tokens(logits, position_keys(n, device), 1.0, 0.95)
    tokens = got.token.cpu()
    assert set(tokens.tolist()) <= set(heads.tolist())
    assert abs(z_score(int((tokens == heads[4]).sum()), n, 0.06 / 0.96)) < 4
    expected = torch.where(tokens == heads[4], 0.06, 0.1) / 0.96
    torch.testing.assert_close(got.probability.cpu(), expected, rtol=1e-5, atol=0)
    below = sample_tokens(logits[:50], position_keys(50, device), 1.0, 0.89).token.cpu()
    assert heads[4] not in below


def test_one_draw_in_a_million(device):
    """64 rare ids of 1e-7 each against one certain one: 6.4 hits expected in a million draws of seconds."""
    n = 1_000_000
    logits = torch.full((1, 65), math.log(1e-7))
    logits[0, 0] = 0.0
    tokens = sample_tokens(logits.to(device).expand(n, -1), position_keys(n, device)).token
    hits = int((tokens != 0).sum())
    assert scipy.stats.poisson.cdf(hits, 6.4) > 1e-4
    assert scipy.stats.poisson.sf(hits - 1, 6.4) > 1e-4
