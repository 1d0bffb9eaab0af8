"""The reference itself, against known answers and naive code that shares nothing with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrgi_ext import philox, reference
from support.helpers import position_keys, random_embedding, random_keys, random_logits

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    words = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == answer


def test_gumbel_from_the_words_of_philox():
    keys = random_keys(50)
    ids = torch.tensor([0, 1, 17, 151_936])
    noise = philox.gumbel(keys, ids)
    for n, (seed, step, iteration, position) in enumerate(keys.tolist()):
        for j, i in enumerate(ids.tolist()):
            counter = tuple(torch.tensor(word) for word in (i, position, iteration % 2**32, step))
            words = philox.philox(counter, (torch.tensor(seed % 2**32), torch.tensor(seed % 2**64 >> 32)))
            u = (int(words[0]) + 2**32 * int(words[1]) + np.longdouble(0.5)) / np.longdouble(2) ** 64
            assert float(noise[n, j]) == pytest.approx(float(-np.log(-np.log1p(-u))), rel=1e-12, abs=1e-12)


def test_gumbel_distribution():
    noise = philox.gumbel(position_keys(200), torch.arange(500)).flatten()
    assert scipy.stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def naive_filter(z: list[float], temperature: float, top_p: float, top_k: int | None) -> list[bool]:
    """The filter by its definition: for every id, add up all that stands ahead of it."""
    top = max(z)
    masses = [round(math.exp((value - top) / temperature) * 2**40) for value in z]
    total = sum(masses)
    kept = []
    for i, value in enumerate(z):
        ahead = [j for j, other in enumerate(z) if other > value or (other == value and j < i)]
        keep = not ahead or float(sum(masses[j] for j in ahead)) <= top_p * float(total)
        if top_k is not None:
            keep = keep and value >= sorted(z, reverse=True)[min(top_k, len(z)) - 1]
        kept.append(keep and value > -math.inf)
    return kept


levels = st.sampled_from([-math.inf, -40.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, math.log(2.0), 3.0])


@given(
    z=st.lists(levels, min_size=1, max_size=12).filter(lambda z: max(z) > -math.inf),
    temperature=st.sampled_from([1e-3, 0.5, 0.7, 1.0, 10.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.95, 1.0]),
    top_k=st.sampled_from([None, 1, 2, 3, 50]),
)
def test_filter_by_its_definition(z, temperature, top_p, top_k):
    kept = reference.kept_by_filter(torch.tensor([z], dtype=torch.float64) + 0.0, temperature, top_p, top_k)
    assert kept[0].tolist() == naive_filter(z, temperature, top_p, top_k)


def test_top_k_never_revives_what_top_p_dropped():
    z = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    # masses ahead: 0, .51, .69, .88: top-p 0.6 keeps ids 0 and 1; the ties of the 2nd largest stay dropped
    assert reference.kept_by_filter(z, 1.0, 0.6, 2)[0].tolist() == [True, True, False, False, False]
    assert reference.kept_by_filter(z, 1.0, 1.0, 2)[0].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 10.0])
def test_statistics_by_scipy(temperature):
    z = random_logits(20, 37, torch.float64)
    z[:, 5] = -math.inf
    got = reference.logit_statistics(z, temperature)
    p = scipy.special.softmax(z.numpy(), axis=1)
    q = scipy.special.softmax(z.numpy() / temperature, axis=1)
    np.testing.assert_allclose(got.entropy, scipy.stats.entropy(p, axis=1), rtol=1e-12)
    np.testing.assert_allclose(got.tempered_entropy, scipy.stats.entropy(q, axis=1), rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(got.logsumexp, scipy.special.logsumexp(z.numpy() / temperature, axis=1), rtol=1e-14)
    assert got.argmax.tolist() == z.numpy().argmax(axis=1).tolist()


def test_relaxed_embedding_gradient_is_the_straight_through_one():
    z = random_logits(6, 11, torch.float64).requires_grad_()
    embedding, x = random_embedding(11, 5, torch.float64), torch.arange(6)
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    seed = random_logits(6, 5, torch.float64, seed=9)

    soft = (z / 0.7).softmax(dim=1) @ embedding
    blended = soft + (weight[:, None] * (embedding[x] - soft)).detach()
    (expected,) = torch.autograd.grad(blended, z, seed)

    lse = (z / 0.7).logsumexp(dim=1).detach()
    output, unblended = reference.relaxed_embedding(z, lse, embedding, x, weight, 0.7)
    (gradient,) = torch.autograd.grad(output, z, seed)
    explicit = reference.logit_gradient(seed, z.detach(), lse, embedding, unblended.detach(), None, 0.7)
    torch.testing.assert_close(output, blended, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(explicit, expected, rtol=0, atol=1e-13)


def test_adam_step_is_torch_optim_adam_ascending():
    z = random_logits(3, 8, torch.float64)
    parameter = z.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.5, maximize=True)
    m = v = None
    for step in range(1, 4):
        gradient = random_logits(3, 8, torch.float64, scale=10.0 ** -(4 * step - 4), seed=step)
        parameter.grad = gradient
        adam.step()
        z, m, v = reference.adam_step(z, m, v, gradient, 0.5, 0.9, 0.999, 1e-8, step)
        torch.testing.assert_close(z, parameter.detach(), rtol=0, atol=1e-13)


@given(st.data())
def test_commit_by_its_definition(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    n, width = sum(lengths), 6
    splits = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    candidates = data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n))
    confidence = data.draw(st.lists(st.sampled_from([math.nan, -math.inf, -1.0, 0.5, 2.0]), min_size=n, max_size=n))
    counts = data.draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths)))
    eos = data.draw(st.sampled_from([None, 0, 2]))
    positions = [i for length in lengths for i in range(length)]

    expected = [[9] * width for _ in lengths]
    done = [False] * n
    for p in range(len(lengths)):
        rank = {}
        for row in range(splits[p], splits[p + 1]):
            low = math.isnan(confidence[row]) or candidates[row] == eos
            if candidates[row] != -1:
                rank[row] = -math.inf if low else confidence[row]
        for row in sorted(rank, key=lambda r: (-rank[r], r))[: counts[p]]:
            expected[p][positions[row]] = candidates[row]
            done[row] = True

    tokens, committed = reference.commit(
        torch.full((len(lengths), width), 9),
        torch.tensor(candidates, dtype=torch.int64),
        torch.tensor(confidence, dtype=torch.float32),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(splits),
        torch.tensor(counts),
        None,
        eos,
        0.0,
    )
    assert tokens.tolist() == expected
    assert committed.tolist() == done
