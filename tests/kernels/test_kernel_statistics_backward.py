"""The gradient of the vocabulary pass against its formula and autograd."""

import math

import pytest
import torch

from support.cases import DTYPES, assert_as_good_as, error, placed

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_statistics_backward(kernels, reference, dtype, present):
    tau = 0.7
    generator = torch.Generator().manual_seed(2333)
    z = (torch.randn(4, 2333, generator=generator) * 3).to(dtype)
    z[1, ::3] = -math.inf
    grads = [torch.randn(4, generator=generator) if here else None for here in present]
    statistics = reference.logit_statistics(z, tau)
    saved = [statistics.logsumexp, reference.logit_statistics(z, 1.0).logsumexp, *statistics[1:3]]

    def formula(dtype):
        x = z.to(dtype).clamp_min(-1e30)
        lse, unit, entropy, tempered = (value.to(dtype)[:, None] for value in saved)
        g = [torch.zeros(4, 1, dtype=dtype) if grad is None else grad.to(dtype)[:, None] for grad in grads]
        log_p, log_q = x - unit, x / tau - lse
        tempered_part = g[0] - g[2] * (log_q + tempered)
        return log_q.exp() * tempered_part / tau - g[1] * log_p.exp() * (log_p + entropy)

    got = kernels.logit_statistics_backward(grads, placed(z, 1, 3), *saved, tau)
    assert got.dtype == dtype
    assert_as_good_as(got, formula(torch.float32).to(dtype), formula(torch.float64))
    assert (got[1, ::3] == 0).all()

    x = z.double().clamp_min(-1e6).requires_grad_()  # PyTorch's own gradient is NaN at -inf
    values = reference.logit_statistics(x, tau)[:3]
    total = sum((g.double() * v).sum() for g, v in zip(grads, values, strict=True) if g is not None)
    (truth,) = torch.autograd.grad(total, x)
    assert error(got, truth) <= max(1e-5, torch.finfo(dtype).eps) * truth.abs().max()
