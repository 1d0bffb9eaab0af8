"""Tensors and tolerances that the kernel tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS32 = torch.finfo(torch.float32).eps


def placed(tensor: Tensor, offset: int = 0, pad: int = 0) -> Tensor:
    """The same matrix with ``offset`` elements before it and ``pad`` after each row, all of them NaN."""
    n, columns = tensor.shape
    stride = columns + pad
    fill = math.nan if tensor.is_floating_point() else -1
    storage = torch.full((offset + n * stride,), fill, dtype=tensor.dtype)
    view = storage.as_strided((n, columns), (stride, 1), offset)
    view.copy_(tensor)
    return view


def row_keys(n: int, iteration: int = 0) -> Tensor:
    """int64 [n, 4] (seed, step, iteration, position); seeds use all 64 bits."""
    keys = torch.empty(n, 4, dtype=torch.long)
    generator = torch.Generator().manual_seed(n)
    keys[:, 0] = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    keys[:, 1] = torch.randint(0, 200, (n,), generator=generator)
    keys[:, 2] = iteration
    keys[:, 3] = torch.arange(n) * 7 + 3
    return keys


def error(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN must meet NaN."""
    got, truth = got.double(), truth.double()
    assert torch.equal(torch.isnan(got), torch.isnan(truth)), "NaN in the wrong places"
    difference = (got - truth).masked_fill(torch.isnan(truth) | (got == truth), 0.0)
    return difference.abs().max().item() if difference.numel() else 0.0


def assert_as_good_as(got: Tensor, torchs: Tensor, truth: Tensor, ulps: float = 4) -> None:
    """At most twice PyTorch's own error, plus a few units in the last place of the largest value."""
    finite = truth[torch.isfinite(truth)].abs()
    scale = max(finite.max().item(), 1.0) if finite.numel() else 1.0
    allowed = 2 * error(torchs, truth) + ulps * torch.finfo(got.dtype).eps * scale
    assert error(got, truth) <= allowed, f"error {error(got, truth):.3g}, allowed {allowed:.3g}"


def relative_l2(got: Tensor, truth: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double() - truth.double())
    return (difference / torch.linalg.vector_norm(truth.double()).clamp_min(1e-300)).item()
