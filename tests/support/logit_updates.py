"""Inputs of the logit update's kernels, and what their results are compared with."""

import math

import torch

from support.cases import assert_as_good_as, relative_l2

TAU = 0.7

ADAM = {"lr": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def aligned(matrix):
    """The same matrix in rows at 16-byte boundaries, with NaN between them and nothing after the last."""
    n, columns = matrix.shape
    stride = columns + -columns % (16 // matrix.element_size())
    storage = torch.full(((n - 1) * stride + columns,), math.nan, dtype=matrix.dtype)
    view = storage.as_strided((n, columns), (stride, 1))
    return view.copy_(matrix)


def inputs(reference, n, vocab, dim, logits_dtype, embedding_dtype, tau=TAU):
    generator = torch.Generator().manual_seed(n + vocab + dim)
    z = (torch.randn(n, vocab, generator=generator) * 3).to(logits_dtype)
    embedding = torch.randn(vocab, dim, generator=generator).to(embedding_dtype)
    grad = (torch.randn(n, dim, generator=generator) * 0.1).to(embedding_dtype)
    lse = reference.logit_statistics(z, tau).logsumexp
    _, soft = reference.relaxed_embedding(z.double(), lse.double(), embedding.double(), None, None, tau)
    return grad, z, lse, embedding, soft.float()


def check_gradient(reference, got, grad, z, lse, embedding, soft, tau=TAU):
    truth = reference.logit_gradient(
        grad.double(), z.double(), lse.double(), embedding.double(), soft.double(), None, tau
    )
    # Products are exact and sums fp32 for 16-bit operands too: far below PyTorch's error, which rounds G E^T.
    assert relative_l2(got, truth) <= 1e-5


def check_adam(reference, z, m, v, z_before, m_before, v_before, gradient, step):
    """Against the step from the kernel's own gradient: Adam magnifies rounding of small gradients."""

    def adam(dtype):
        moments = [x.to(dtype) for x in (m_before, v_before)]
        return reference.adam_step(z_before.to(dtype), *moments, gradient.to(dtype), step=step, **ADAM)

    truth, torchs = adam(torch.float64), adam(torch.float32)
    assert_as_good_as(z, torchs[0].to(z.dtype), truth[0], ulps=1)
    if m is not None:
        assert_as_good_as(m, torchs[1], truth[1], ulps=1)
        assert_as_good_as(v, torchs[2], truth[2], ulps=1)
