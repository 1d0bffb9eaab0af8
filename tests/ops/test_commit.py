"""Operator 4: which candidates are written, and that nothing else is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrgi_ext import commit_, reference
from support.helpers import position_keys, random_keys

MASK, EOS = 99, 4


@dataclass
class Batch:
    tokens: torch.Tensor
    candidates: torch.Tensor
    confidence: torch.Tensor
    positions: torch.Tensor
    splits: torch.Tensor
    counts: torch.Tensor

    def on(self, device: str) -> Batch:
        return Batch(*(t.to(device) for t in vars(self).values()))


def commit(batch: Batch, keys=None, eos_token_id=None, alg_temp=0.0):
    """The operator on copies; ``committed`` holds True beforehand, to see that all of it is written."""
    tokens, committed = batch.tokens.clone(), torch.ones_like(batch.candidates, dtype=torch.bool)
    arguments = (batch.candidates, batch.confidence, batch.positions, batch.splits, batch.counts)
    result = commit_(tokens, committed, *arguments, keys=keys, eos_token_id=eos_token_id, alg_temp=alg_temp)
    assert result is None
    return tokens.cpu(), committed.cpu()


def expected(batch: Batch, keys=None, eos_token_id=None, alg_temp=0.0):
    host, keys = batch.on("cpu"), None if keys is None else keys.cpu()
    return reference.commit(*vars(host).values(), keys, eos_token_id, alg_temp)


confidences = st.sampled_from([math.nan, -math.inf, math.inf, -3.5, -1.0, -0.0, 0.0, 0.5, 1.0])


@st.composite
def batches(draw) -> Batch:
    """Trajectories of 0 to 7 masked positions among 9; many equal confidences."""
    width = 9
    masked = draw(st.lists(st.sets(st.integers(0, width - 1), max_size=7), min_size=1, max_size=4))
    positions = [position for columns in masked for position in sorted(columns)]
    n = len(positions)
    tokens = torch.arange(len(masked) * width).view(len(masked), width) + 1000
    for p, columns in enumerate(masked):
        tokens[p, sorted(columns)] = MASK
    return Batch(
        tokens,
        torch.tensor(draw(st.lists(st.integers(-1, 6), min_size=n, max_size=n)), dtype=torch.int64),
        torch.tensor(
            draw(st.lists(confidences, min_size=n, max_size=n)),
            dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        ),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor([0, *(len(columns) for columns in masked)]).cumsum(0),
        torch.tensor(draw(st.lists(st.integers(0, 8), min_size=len(masked), max_size=len(masked)))),
    )


def fp64_only_on_cpu(batch: Batch, device: str) -> Batch:
    if device != "cpu":
        batch.confidence = batch.confidence.float()
    return batch.on(device)


@given(batch=batches(), eos=st.sampled_from([None, EOS, 0]))
def test_equals_the_reference(device, batch, eos):
    batch = fp64_only_on_cpu(batch, device)
    tokens, committed = commit(batch, eos_token_id=eos)
    expected_tokens, expected_committed = expected(batch, eos_token_id=eos)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(committed, expected_committed)


@given(batch=batches(), eos=st.sampled_from([None, EOS]))
def test_properties(device, batch, eos):
    batch = fp64_only_on_cpu(batch, device)
    tokens, committed = commit(batch, eos_token_id=eos)
    host = batch.on("cpu")
    written = torch.zeros_like(tokens, dtype=torch.bool)
    score = host.confidence.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if eos is not None:
        score[host.candidates == eos] = -math.inf
    for p in range(tokens.shape[0]):
        rows = range(int(host.splits[p]), int(host.splits[p + 1]))
        eligible = [r for r in rows if host.candidates[r] >= 0]
        chosen = [r for r in rows if committed[r]]
        assert set(chosen) <= set(eligible), "token -1 was committed"
        assert len(chosen) == min(int(host.counts[p]), len(eligible))
        for r in chosen:
            written[p, host.positions[r]] = True
            assert tokens[p, host.positions[r]] == host.candidates[r]
            for other in set(eligible) - set(chosen):
                assert score[r] > score[other] or (score[r] == score[other] and r < other)
    assert torch.equal(tokens[~written], host.tokens[~written])


@given(batch=batches(), seed=st.integers(0, 50), alg_temp=st.sampled_from([0.01, 0.7, 5.0]))
def test_random_positions_equal_the_reference(device, batch, seed, alg_temp):
    batch = fp64_only_on_cpu(batch, device)
    keys = random_keys(len(batch.candidates), device, seed=seed)
    keys[:, 2] = -2
    tokens, committed = commit(batch, keys, EOS, alg_temp)
    expected_tokens, expected_committed = expected(batch, keys, EOS, alg_temp)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(committed, expected_committed)


def single(confidence, count, candidates=None) -> Batch:
    n = len(confidence)
    return Batch(
        torch.full((1, n), MASK),
        torch.arange(n) if candidates is None else torch.tensor(candidates),
        torch.tensor(confidence),
        torch.arange(n),
        torch.tensor([0, n]),
        torch.tensor([count]),
    )


def test_random_positions_are_drawn_from_softmax(device):
    """The first position is i with probability softmax(confidence / alg_temp)_i; each trajectory is one draw."""
    p, n, alg_temp = 10_000, 5, 0.5
    confidence = torch.tensor([0.1, -0.4, 0.6, 0.0, 0.3])
    batch = Batch(
        torch.full((p, n), MASK),
        torch.arange(n).repeat(p),
        confidence.repeat(p),
        torch.arange(n).repeat(p),
        torch.arange(p + 1) * n,
        torch.ones(p, dtype=torch.int64),
    ).on(device)
    _, committed = commit(batch, position_keys(p * n, device), None, alg_temp)
    counts = committed.view(p, n).sum(0)
    assert counts.sum() == p
    probabilities = torch.softmax(confidence.double() / alg_temp, 0)
    assert scipy.stats.chisquare(counts.numpy(), (p * probabilities).numpy()).pvalue > 1e-4


def test_without_alg_temp_keys_are_not_used(device):
    batch = single([0.1, 0.9, 0.5], 2).on(device)
    for keys in (None, position_keys(3, device), random_keys(3, device)):
        assert commit(batch, keys)[0].tolist() == [[MASK, 1, 2]]


def test_eos_goes_last_but_goes(device):
    """-inf ranks last among the masked positions, yet before nothing at all."""
    batch = single([0.9, 0.1, 0.5], 2, [EOS, 7, 8]).on(device)
    assert commit(batch, eos_token_id=EOS)[0].tolist() == [[MASK, 7, 8]]
    assert commit(batch)[0].tolist() == [[EOS, MASK, 8]]
    batch = single([0.9, 0.1, 0.5], 3, [EOS, 7, 8]).on(device)
    assert commit(batch, eos_token_id=EOS)[0].tolist() == [[EOS, 7, 8]]


def test_eos_id_zero_is_an_id(device):
    batch = single([0.9, 0.1, 0.5], 1, [0, 7, 8]).on(device)
    assert commit(batch, eos_token_id=0)[0].tolist() == [[MASK, MASK, 8]]


def test_equals_go_by_row_and_nan_goes_last(device):
    batch = single([math.nan, 0.5, math.nan, 0.5, -math.inf, 0.5], 2).on(device)
    assert commit(batch)[0].tolist() == [[MASK, 1, MASK, 3, MASK, MASK]]
    batch.counts += 2  # NaN and -inf are equals: rows 0, then 2, then 4
    assert commit(batch)[0].tolist() == [[0, 1, MASK, 3, MASK, 5]]
    batch.counts += 1
    assert commit(batch)[0].tolist() == [[0, 1, 2, 3, MASK, 5]]


def test_many_positions(device):
    """More masked positions than any block of threads, confidences with ties, counts beyond them."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2500, 0, 1, 1300]
    n, width = sum(lengths), 3000
    positions = torch.cat([torch.randperm(width, generator=generator)[:length].sort().values for length in lengths])
    batch = Batch(
        torch.full((4, width), MASK),
        torch.randint(-1, 50, (n,), generator=generator),
        torch.randint(0, 40, (n,), generator=generator) / 7,
        positions,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor([1234, 5, 0, 10_000]),
    ).on(device)
    for eos in (None, EOS):
        for got, want in zip(commit(batch, eos_token_id=eos), expected(batch, eos_token_id=eos), strict=True):
            assert torch.equal(got, want)
    keys = position_keys(n, device)
    for got, want in zip(commit(batch, keys, EOS, 0.3), expected(batch, keys, EOS, 0.3), strict=True):
        assert torch.equal(got, want)


def test_rows_of_no_trajectory_are_not_committed(device):
    """The rows may be a bucket larger than what the splits cover."""
    batch = single([0.1, 0.9, 0.5, 0.8], 4).on(device)
    batch.splits = torch.tensor([1, 3], device=device)
    tokens, committed = commit(batch)
    assert tokens.tolist() == [[MASK, 1, 2, MASK]]
    assert committed.tolist() == [False, True, True, False]


@pytest.mark.parametrize("alg_temp", [0.0, 0.7])
def test_nothing_of_a_padding_row_is_read(device, alg_temp):
    """Rows of a bucket beyond splits[-1] (and before splits[0]) hold nonsense that no real row may: neither an error
    nor a change."""
    generator = torch.Generator().manual_seed(0)
    lengths, width = [5, 0, 7], 20
    n = sum(lengths)
    positions = torch.cat([torch.randperm(width, generator=generator)[:length].sort().values for length in lengths])
    batch = Batch(
        torch.full((3, width), MASK),
        torch.randint(0, 50, (n,), generator=generator),
        torch.rand(n, generator=generator),
        positions,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor([2, 1, 3]),
    )
    keys = random_keys(n)
    tokens, committed = commit(batch.on(device), keys.to(device), EOS, alg_temp)
    nonsense = {"candidates": [3, -2, 2**40], "confidence": [math.inf, math.nan, 9.0], "positions": [2**40, -1, 0]}
    padded = Batch(**vars(batch))
    for name, values in nonsense.items():
        before, after = torch.tensor(values[:1]), torch.tensor(values)
        setattr(padded, name, torch.cat([before, getattr(batch, name), after]))
    padded.splits = batch.splits + 1
    padded_keys = torch.cat([random_keys(1, seed=8), keys, random_keys(3, seed=9)])
    got, got_committed = commit(padded.on(device), padded_keys.to(device), EOS, alg_temp)
    assert torch.equal(got, tokens)
    assert torch.equal(got_committed[1:-3], committed)
    assert not got_committed[[0, -3, -2, -1]].any()
    for a, b in zip(expected(padded, padded_keys, EOS, alg_temp), (got, got_committed), strict=True):
        assert torch.equal(a, b)


def test_strided_tokens(device):
    """The response is a slice of the whole sequence."""
    batch = single([0.1, 0.9, 0.5], 2).on(device)
    whole = torch.full((1, 10), 5, device=device)
    batch.tokens = whole[:, 4:7]
    committed = torch.empty(3, dtype=torch.bool, device=device)
    commit_(batch.tokens, committed, *list(vars(batch).values())[1:])
    assert whole.tolist() == [[5, 5, 5, 5, 5, 1, 2, 5, 5, 5]]


@pytest.mark.parametrize("trajectories", [0, 1, 3])
def test_no_rows(device, trajectories):
    empty = torch.empty(0, dtype=torch.int64)
    splits, counts = torch.zeros(trajectories + 1, dtype=torch.int64), torch.full((trajectories,), 2)
    batch = Batch(torch.full((trajectories, 4), MASK), empty, torch.empty(0), empty, splits, counts).on(device)
    tokens, committed = commit(batch)
    assert (tokens == MASK).all()
    assert committed.shape == (0,)


def test_an_alg_temp_that_underflows_commits_no_more_than_asked(device):
    """1e-60 is 0 in fp32, and 0 / 0 must not rank above, or beside, everything else."""
    n = 40
    tokens = torch.zeros(1, n, dtype=torch.long, device=device)
    committed = torch.zeros(n, dtype=torch.bool, device=device)
    rows = torch.arange(n, device=device)
    keys = torch.stack([rows] * 4, dim=1)
    splits, counts = torch.tensor([0, n], device=device), torch.tensor([3], device=device)
    commit_(tokens, committed, rows + 1, torch.zeros(n, device=device), rows, splits, counts, keys=keys, alg_temp=1e-60)
    assert committed.sum() == 3
    assert (tokens != 0).sum() == 3
