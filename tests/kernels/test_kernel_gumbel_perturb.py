"""The Gumbel perturbation against ``entrgi_ext.reference``."""

import math

import pytest
import torch

from support.cases import DTYPES, assert_as_good_as, placed, row_keys

pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2)]


def logits(n, vocab, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(n * 10_007 + vocab)
    return (torch.randn(n, vocab, generator=generator) * scale).to(dtype)


def check(reference, got, z, keys, scale):
    truth = reference.gumbel_perturb(z.double(), keys, scale)
    assert_as_good_as(got, reference.gumbel_perturb(z, keys, scale), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 9, 2045, 2046, 2047, 2048, 2049, 4093, 5001])
def test_sizes(kernels, reference, dtype, vocab):
    """Odd row lengths: the rows of one matrix start at every alignment."""
    z, keys = logits(5, vocab, dtype), row_keys(5)
    check(reference, kernels.gumbel_perturb(z, keys, 0.7), z, keys, 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e6])
def test_scales(kernels, reference, dtype, scale):
    z, keys = logits(2, 3001, dtype), row_keys(2)
    got = kernels.gumbel_perturb(z, keys, scale)
    check(reference, got, z, keys, scale)
    if scale == 0:
        assert torch.equal(got, z.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "pad"), [(1, 0), (0, 1), (2, 2), (3, 5), (8, 8), (4, 12)])
def test_layouts(kernels, dtype, offset, pad):
    """Of logits and output, each on its own: not a bit changes, and nothing beside the rows is written."""
    z, keys = logits(4, 1003, dtype), row_keys(4)
    expected = kernels.gumbel_perturb(z, keys, 0.7)
    for z_place, out_place in (((offset, pad), (0, 0)), ((0, 0), (offset, pad)), ((offset, pad), (pad, offset))):
        output = placed(torch.zeros(4, 1003), *out_place)
        kernels.gumbel_perturb(placed(z, *z_place), keys, 0.7, output)
        assert torch.equal(output, expected)
        storage = torch.empty(0).set_(output.untyped_storage())
        assert torch.isnan(storage).sum() == storage.numel() - output.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels, dtype):
    assert kernels.gumbel_perturb(torch.empty(0, 7, dtype=dtype), row_keys(0), 1.0).shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay(kernels, reference, dtype):
    z, keys = logits(3, 1500, dtype), row_keys(3)
    z[0, ::3] = -math.inf
    z[1, 700], z[1, 1499], z[1, 0] = math.nan, math.inf, -math.inf
    z[2] = -math.inf
    got = kernels.gumbel_perturb(z, keys, 0.7)
    special = ~torch.isfinite(z)
    assert torch.equal(got[special].nan_to_num(nan=5.0), z[special].float().nan_to_num(nan=5.0))
    check(reference, got[:1], z[:1], keys[:1], 0.7)


def test_extreme_keys(kernels, reference):
    extremes = [0, -1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)]
    keys = torch.tensor([[x if i == column else 5 for i in range(4)] for column in range(4) for x in extremes])
    z = torch.zeros(len(keys), 9)
    check(reference, kernels.gumbel_perturb(z, keys, 1.0), z, keys, 1.0)


def test_both_tails_of_the_noise(kernels, reference):
    """Uniforms within 2^-32 of 0 and of 1: see tests/ops/test_gumbel_perturb.py."""
    keys = torch.tensor([[7, 0, 0, 16_096_385], [7, 0, 0, 11_004_034]])
    got = kernels.gumbel_perturb(torch.zeros(2, 1003), keys, 1.0)
    assert got[0, 424].item() == pytest.approx(reference.gumbel(keys[:1], torch.tensor([424])).item(), rel=1e-6)
    assert got[1, 975].item() == pytest.approx(reference.gumbel(keys[1:], torch.tensor([975])).item(), rel=1e-6)
    assert got[0, 424] > 25
    assert got[1, 975] < -3.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_maximum_is_the_token_drawn(kernels, reference, dtype):
    z, keys = logits(60, 803, dtype), row_keys(60)
    tau = 0.7
    token = kernels.sample_tokens(z, keys, tau)[4]
    best = reference.gumbel_perturb(z.double(), keys, tau).topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert clear.sum() >= 59
    assert torch.equal(kernels.gumbel_perturb(z, keys, tau).argmax(dim=1)[clear], token[clear])
    tempered = z.float() / tau
    assert torch.equal(kernels.gumbel_perturb(tempered, keys, 1.0).argmax(dim=1)[clear], token[clear])


def test_noise_depends_on_its_own_key_and_id_only(kernels):
    z, keys = logits(4, 2501, torch.bfloat16), row_keys(4)
    whole = kernels.gumbel_perturb(z, keys, 0.7)
    assert torch.equal(kernels.gumbel_perturb(z, keys, 0.7), whole)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(kernels.gumbel_perturb(z[order].contiguous(), keys[order].contiguous(), 0.7), whole[order])
    assert torch.equal(kernels.gumbel_perturb(z[1:2], keys[1:2], 0.7), whole[1:2])
