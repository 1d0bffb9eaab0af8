"""The commit kernel against ``entrgi_ext.reference``."""

import math

import pytest
import torch

from support.cases import row_keys

pytestmark = pytest.mark.simulator


def check(kernels, reference, tokens, candidates, confidence, positions, splits, counts, keys=None, eos=None, temp=0.0):
    arguments = candidates, confidence, positions, splits, counts, keys, eos, temp
    expected, expected_committed = reference.commit(tokens, *arguments)
    got, committed = tokens.clone(), torch.empty(candidates.shape, dtype=torch.bool)
    kernels.commit_(got, committed, *arguments)
    assert torch.equal(got, expected)
    assert torch.equal(committed, expected_committed)


def batch(sizes, length, seed=0):
    """Trajectories with that many candidates each, at distinct positions."""
    generator = torch.Generator().manual_seed(seed)
    splits = torch.tensor([0, *sizes]).cumsum(0)
    n = int(splits[-1])
    positions = torch.cat([torch.randperm(length, generator=generator)[:size].sort().values for size in sizes])
    tokens = torch.randint(0, 1000, (len(sizes), length), generator=generator)
    candidates = torch.randint(1000, 2000, (n,), generator=generator)
    confidence = torch.randint(-8, 8, (n,), generator=generator).float()  # many ties
    counts = torch.tensor([min(i, size) for i, size in enumerate(sizes)])
    return tokens, candidates, confidence, positions, splits, counts


@pytest.mark.parametrize("sizes", [[5], [3, 0, 7, 1], [300, 17, 1, 600], [128] * 6])
def test_best_of_each_trajectory(kernels, reference, sizes):
    arguments = batch(sizes, 700)
    check(kernels, reference, *arguments)
    check(kernels, reference, *arguments[:-1], arguments[-1] * 0 + 1)
    check(kernels, reference, *arguments[:-1], torch.tensor(sizes) + 5)  # more than there are
    check(kernels, reference, *arguments[:-1], arguments[-1] * 0)


def test_special_confidences_and_tokens(kernels, reference):
    tokens, candidates, confidence, positions, splits, _ = batch([40, 30, 20], 64)
    confidence[::4] = math.nan
    confidence[1::5] = -math.inf
    confidence[2::7] = math.inf
    candidates[::3] = -1
    candidates[1::4] = 7
    for eos in (None, 7, 0):
        for counts in ([1, 2, 3], [39, 1, 20], [0, 30, 10]):
            check(kernels, reference, tokens, candidates, confidence, positions, splits, torch.tensor(counts), eos=eos)


def test_drawn_positions(kernels, reference):
    tokens, candidates, confidence, positions, splits, _ = batch([50, 300], 400)
    candidates[::9] = 7
    keys = row_keys(350, iteration=-2)
    for temp in (0.5, 100.0):
        for counts in ([1, 3], [25, 150]):
            check(
                kernels,
                reference,
                tokens,
                candidates,
                confidence,
                positions,
                splits,
                torch.tensor(counts),
                keys,
                7,
                temp,
            )


def test_a_temperature_of_zero_in_fp32(kernels):
    """0 / 0 is NaN, and a NaN has nobody ahead of it: still no more than ``counts``."""
    tokens, candidates, _, positions, splits, _ = batch([40], 64)
    committed = torch.empty(40, dtype=torch.bool)
    counts = torch.tensor([3])
    kernels.commit_(
        tokens, committed, candidates, torch.zeros(40), positions, splits, counts, row_keys(40), None, 1e-60
    )
    assert committed.sum() == 3


def test_strided_tokens_and_empty_batches(kernels, reference):
    tokens, *rest = batch([3, 4], 32)
    wide = torch.full((2, 40), -5)
    view = wide[:, 4:36]
    view.copy_(tokens)
    committed = torch.empty(7, dtype=torch.bool)
    kernels.commit_(view, committed, *rest, None, None, 0.0)
    expected, expected_committed = reference.commit(tokens, *rest, None, None, 0.0)
    assert torch.equal(view, expected)
    assert torch.equal(committed, expected_committed)
    assert (wide[:, :4] == -5).all()
    assert (wide[:, 36:] == -5).all()

    none = torch.empty(0, dtype=torch.long)
    check(
        kernels, reference, tokens, none, torch.empty(0), none, torch.zeros(3, dtype=torch.long), torch.ones(2).long()
    )
    committed = torch.empty(0, dtype=torch.bool)
    kernels.commit_(
        torch.empty(0, 4).long(), committed, none, torch.empty(0), none, torch.zeros(1).long(), none, None, None, 0.0
    )


def test_rows_of_no_trajectory_are_not_committed(kernels, reference):
    """Padding rows behind the last trajectory (and before the first): false, whatever memory held."""
    tokens, candidates, confidence, positions, _, _ = batch([10], 16)
    committed = torch.empty(10, dtype=torch.bool)
    kernels.commit_(
        tokens, committed, candidates, confidence, positions, torch.tensor([2, 7]), torch.tensor([9]), None, None, 0.0
    )
    assert committed.tolist() == [False] * 2 + [True] * 5 + [False] * 3
    # Nothing of the rows behind is read: they are not even there.
    here = [x[:7].clone() for x in (candidates, confidence, positions)]
    rest = torch.tensor([2, 7]), torch.tensor([3]), row_keys(7), None
    for temp in (0.0, 0.5):
        committed = torch.empty(10, dtype=torch.bool)
        got = tokens.clone()
        kernels.commit_(got, committed, *here, *rest, temp)
        expected, expected_committed = reference.commit(tokens, *here, *rest, temp)
        assert torch.equal(got, expected)
        assert committed.tolist() == [*expected_committed.tolist(), False, False, False]
    # Positions outside the tokens are never written.
    outside = torch.tensor([-1, 16, 99, -(2**40), 2**40, 0, 1, 2, 3, 4])
    before = tokens.clone()
    kernels.commit_(
        tokens, committed, candidates, confidence, outside, torch.tensor([0, 5]), torch.tensor([5]), None, None, 0.0
    )
    assert torch.equal(tokens, before)
