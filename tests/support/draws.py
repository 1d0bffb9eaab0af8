"""Logits for the vocabulary pass, what its results are compared with, and calls under a forced plan."""

import pytest
import torch

from support.cases import assert_as_good_as


def require_hopper(kernels):
    kernels.logit_statistics(torch.zeros(1, 1), 1.0)
    if kernels.plan["kernel"] != "vocab_pass_sm90":
        pytest.skip("needs code for sm_90a")


def logits(n, vocab, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(n * 10_007 + vocab)
    return (torch.randn(n, vocab, generator=generator) * scale).to(dtype)


def check_statistics(reference, got, z, tau):
    truth, torchs = reference.logit_statistics(z.double(), tau), reference.logit_statistics(z, tau)
    for g, t, x in zip(got[:3], torchs[:3], truth[:3], strict=True):
        assert_as_good_as(g, t, x)
    assert torch.equal(got[3], truth.argmax)


def check_draw(reference, got, z, keys, tau, **options):
    truth = reference.sample_tokens(z.double(), keys, tau, **options)
    torchs = reference.sample_tokens(z, keys, tau, **options)
    assert torch.equal(got[4], truth.token)
    for g, t, x in zip(got[5:], torchs[5:], truth[5:], strict=True):
        assert_as_good_as(g, t, x)


def sampled(kernels, z, keys, tau, overrides, **options):
    with kernels.overridden(**overrides):
        return kernels.sample_tokens(z, keys, tau, **options)
