import pytest
import torch

from entrgi.schedule import commit_counts, confidence, plan
from entrgi_ext.reference import Sample


def test_published_counts():
    """L = T = 128: none first, then one a step, two last."""
    assert commit_counts(128, 128) == [0] + [1] * 126 + [2]


@pytest.mark.parametrize(
    ("masked", "steps", "expected"),
    [
        # By hand from t = linspace(1, 1e-3, T + 1): n = int(left * (1 - t[j+1] / t[j])).
        (8, 4, [1, 2, 2, 3]),
        (4, 8, [0, 0, 0, 0, 0, 1, 1, 2]),
        (1, 1, [1]),
        (1, 5, [0, 0, 0, 0, 1]),
        (10, 1, [10]),
        (0, 3, [0, 0, 0]),
    ],
)
def test_counts(masked, steps, expected):
    assert commit_counts(masked, steps) == expected


@pytest.mark.parametrize("masked", [1, 7, 64, 128, 500])
@pytest.mark.parametrize("steps", [1, 2, 13, 64, 200])
def test_everything_is_committed(masked, steps):
    counts = commit_counts(masked, steps)
    assert len(counts) == steps
    assert sum(counts) == masked
    assert min(counts) >= 0


def test_plan_keeps_only_what_commits():
    masked, steps = [8, 2, 5], 6
    left = list(masked)
    by_index = {step.index: step for step in plan(masked, steps, torch.device("cpu"))}
    for j in range(steps):
        counts = [commit_counts(n, steps)[j] for n in masked]
        active = [p for p in range(3) if counts[p]]
        if not active:
            assert j not in by_index
            continue
        step = by_index[j]
        assert step.active.tolist() == active
        assert step.counts.tolist() == [counts[p] for p in active]
        assert step.splits.diff().tolist() == [left[p] for p in active]
        assert (step.splits[0], step.splits[-1]) == (0, step.masked)
        assert step.total == sum(counts)
        left = [n - c for n, c in zip(left, counts, strict=True)]
    assert left == [0, 0, 0]


def sample():
    fields = dict.fromkeys(Sample._fields, torch.zeros(2))
    fields |= {"token": torch.tensor([2, -1]), "probability": torch.tensor([0.5, 0.2])}
    fields |= {"margin": torch.tensor([0.1, 0.3]), "filtered_entropy": torch.tensor([1.0, 2.0])}
    return Sample(**fields)


@pytest.mark.parametrize(
    ("alg", "source", "expected"),
    [
        ("entropy", "initial", [-3.0, -4.0]),
        ("entropy", "filtered", [-1.0, -2.0]),
        ("maskgit_plus", "initial", [0.5, 0.2]),
        ("topk_margin", "filtered", [0.1, 0.3]),
        ("anchor", "initial", [7.0, -5.0]),
    ],
)
def test_confidence(alg, source, expected):
    logits = torch.tensor([[1.0, 2.0, 7.0], [-5.0, 8.0, 9.0]], dtype=torch.bfloat16)
    got = confidence(alg, sample(), logits, torch.tensor([3.0, 4.0]), source)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_unknown_confidence():
    with pytest.raises(ValueError, match="'origin'"):
        confidence("origin", sample(), torch.zeros(2, 3), torch.zeros(2), "initial")
