"""Logits so large, or temperatures so small, that their quotient leaves fp32: results that are right, or an error."""

from __future__ import annotations

import pytest
import torch

from entrgi_ext import commit_, logit_statistics, sample_tokens
from support.calls import OPERATORS, arguments, call
from support.helpers import random_keys

# (logits' dtype, temperature, the size of the logits)
BEYOND = [
    (torch.float32, 1e-6, 1e33),
    (torch.float32, 0.5, 3e38),
    (torch.bfloat16, 0.5, 3e38),
    (torch.float32, 1e-6, -1e33),
    (torch.float64, 1e-6, 1e305),
]


def logits_of(dtype: torch.dtype, size: float, n: int = 5, v: int = 37) -> torch.Tensor:
    """The largest of row i is at id i, and well beyond its neighbours."""
    logits = torch.full((n, v), size if size < 0 else -size, dtype=torch.float64)
    logits[torch.arange(n), torch.arange(n)] = size / 2 if size < 0 else size
    return logits.to(dtype)


@pytest.mark.parametrize(("dtype", "temperature", "size"), BEYOND)
def test_statistics_and_draws_are_right(dtype, temperature, size):
    """Differences of logits are taken before they are divided."""
    logits, expected = logits_of(dtype, size), torch.arange(5)
    sample = sample_tokens(logits, random_keys(5), temperature, 0.9)
    for statistics in (sample, logit_statistics(logits, temperature)):
        assert torch.equal(statistics.argmax, expected)
        assert (statistics.entropy == 0).all()
        assert (statistics.tempered_entropy == 0).all()
        assert statistics.logsumexp.isinf().all()
    assert torch.equal(sample.token, expected)
    assert (sample.probability == 1).all()
    assert (sample.margin == 1).all()


READS_LOGSUMEXP = [name for name in OPERATORS if "logsumexp" in arguments(name)]


@pytest.mark.parametrize(("dtype", "temperature", "size"), BEYOND)
@pytest.mark.parametrize("name", READS_LOGSUMEXP)
def test_what_reads_the_logsumexp_refuses_it(name, dtype, temperature, size):
    keywords = arguments(name, dtype=dtype)
    logits = keywords["logits"].clone()
    logits[1] = logits_of(dtype, size)[1]
    keywords.update(logits=logits, temperature=temperature)
    keywords["logsumexp"] = logit_statistics(logits, temperature).logsumexp
    with pytest.raises(RuntimeError, match=r"logsumexp must be finite, got -?inf at 1: logits / temperature must stay"):
        call(name, keywords)
    if "row_index" in keywords:  # nothing of a padding row is read
        keywords["row_index"][1] = -1
        call(name, keywords)


@pytest.mark.parametrize(("dtype", "temperature", "size"), BEYOND)
def test_gradients_refuse_it(dtype, temperature, size):
    logits = logits_of(dtype, size).requires_grad_()
    logit_statistics(logits, temperature).entropy.sum().backward()
    assert (logits.grad == 0).all()
    for result in ("logsumexp", "tempered_entropy"):
        with pytest.raises(RuntimeError, match="logsumexp must be finite"):
            getattr(logit_statistics(logits, temperature), result).sum().backward()


@pytest.mark.parametrize("alg_temp", [1e-20, 1e-30, 1e-39, 1e-45, 1e-60, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_temperatures_of_the_commit_rank_by_confidence(device, alg_temp, dtype):
    """In fp32, confidences divided by 1e-39 are all infinite, and by 1e-60 not even that."""
    if device != "cpu":
        dtype = torch.float32
    n = 40
    tokens = torch.zeros(1, n, dtype=torch.long, device=device)
    committed = torch.zeros(n, dtype=torch.bool, device=device)
    rows = torch.arange(n, device=device)
    confidence = -torch.linspace(12, 0.5, n, dtype=dtype, device=device)
    splits, counts = torch.tensor([0, n], device=device), torch.tensor([3], device=device)
    keys = random_keys(n, device)
    commit_(tokens, committed, rows, confidence, rows, splits, counts, keys=keys, alg_temp=alg_temp)
    assert committed.nonzero().flatten().tolist() == [n - 3, n - 2, n - 1]
