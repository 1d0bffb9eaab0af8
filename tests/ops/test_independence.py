"""The bits of a row depend on that row alone: not on the number of threads, not on the rows beside it."""

from __future__ import annotations

import pytest
import torch

import entrgi_ext
from support.calls import OPERATORS, WRITTEN, arguments, call
from support.helpers import assert_same, logsumexp, random_embedding, random_keys, random_logits

THREADS = (1, 2, 5, 8, 9, 17, 32)
# Around what cuts the work: at most 16 parts of 512 ids, stretches of 1024 and 2048, chunks of 4096; 160 rows.
SHAPES = [(3, 1000, 64), (1, 30_000, 512), (7, 9001, 72), (200, 1500, 40), (40, 10_000, 1100)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(name: str, keywords: dict) -> list[torch.Tensor]:
    keywords = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}
    result = call(name, keywords)
    result = () if result is None else result if isinstance(result, tuple) else (result,)
    return [*result, *(keywords[key] for key in WRITTEN.get(name, []))]


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_bits_do_not_depend_on_the_number_of_threads(threads, name, n, v, d, dtype):
    keywords = arguments(name, "cpu", dtype, n, v, d)
    expected = None
    for count in THREADS:
        threads(count)
        got = results(name, keywords)
        for a, b in zip(got, expected or got, strict=True):
            assert_same(a, b, f"{name} on {count} threads")
        expected = expected or got


def rows_of(part: slice, temperature: float, logits, embedding, gradient, keys):
    """All that the operators make of some rows."""
    z, g = logits[part].clone(), gradient[part]
    sample = entrgi_ext.sample_tokens(z, keys[part], temperature, 0.9, 20)
    perturbed = entrgi_ext.gumbel_perturb(z, keys[part], temperature)
    output, soft = entrgi_ext.relaxed_embedding(
        z, embedding, temperature, hard_tokens=sample.token, weight=sample.entropy / 12, logsumexp=sample.logsumexp
    )
    slope = entrgi_ext.logit_gradient(g, z, sample.logsumexp, embedding, soft, temperature)
    statics = (g, sample.logsumexp, embedding, soft, temperature)
    descended = z.clone()
    entrgi_ext.sgd_step_(descended, *statics, lr=0.5)
    moments = [torch.zeros(z.shape, dtype=soft.dtype) for _ in range(2)]
    for step in (1, 2):
        entrgi_ext.adam_step_(z, *moments, *statics, lr=0.5, step=step)
    return (*sample, perturbed, output, soft, slope, descended, z, *moments)


COUNTS = (*range(1, 18), 31, 100, 159, 160, 161, 175, 176, 177, 191, 192, 200, 320, 336, 399)


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("temperature", [0.7, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "v", "d"), [(400, 2100, 64), (24, 20_000, 600), (200, 1100, 1030)])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(n, v, d, dtype, temperature):
    """At a temperature of 1e-6 q is one-hot and the update nothing but rounding errors, which Adam makes as large as
    any other. At usual ones fewer than 16 rows may differ from more in their last bits."""
    inputs = random_logits(n, v, dtype), random_embedding(v, d, dtype), random_embedding(n, d, dtype, seed=5)
    inputs = (*inputs, random_keys(n))
    expected = rows_of(slice(0, n), temperature, *inputs)
    for count in [count for count in COUNTS if count < n and (count >= 16 or temperature < 1 / 16)]:
        for first in (0, n - count):
            part = slice(first, first + count)
            for i, (a, b) in enumerate(zip(rows_of(part, temperature, *inputs), expected, strict=True)):
                assert_same(a, b[part], f"result {i} of {count} rows from {first}")


def test_padding_rows_change_no_bits(threads):
    threads(2)
    n, v, d = 30, 3000, 96
    z, e, g = random_logits(n, v), random_embedding(v, d), random_embedding(n, d, seed=5)
    lse = logsumexp(z, 0.7)
    output, soft = entrgi_ext.relaxed_embedding(z, e, 0.7, logsumexp=lse)
    rows = torch.arange(n)
    rows[3::2] = -1
    kept = rows >= 0
    some, some_soft = torch.zeros(n, d), torch.zeros(n, d)
    entrgi_ext.relaxed_embedding_(some, some_soft, z, lse, e, 0.7, row_index=rows)
    assert_same(some[kept], output[kept])
    assert_same(some_soft[kept], soft[kept])
    slope = entrgi_ext.logit_gradient(g, z, lse, e, soft, 0.7)
    assert_same(entrgi_ext.logit_gradient(g, z, lse, e, soft, 0.7, row_index=rows)[kept], slope[kept])
