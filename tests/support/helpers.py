"""What the operator tests share: inputs of every dtype, the fp64 truth, and the measure of error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entrgi_ext import reference

LOW = (torch.bfloat16, torch.float16, torch.float32)
LOGIT_DTYPES = (*LOW, torch.float64)
DTYPE_PAIRS = (*((z, e) for z in LOW for e in LOW), (torch.float64, torch.float64))
# kernels.md: relative L2 error that the logit update may have against fp64 on the same rounded operands.
UPDATE_BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-11}
LARGE_VOCABULARY = 151_937


def skip_fp64_on_cuda(device: str, *dtypes: torch.dtype) -> None:
    import pytest

    if device != "cpu" and torch.float64 in dtypes:
        pytest.skip("fp64 operators exist on the CPU only")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(
    n: int, v: int, dtype: torch.dtype = torch.float32, device: str = "cpu", *, scale: float = 4.0, seed: int = 0
) -> Tensor:
    return (scale * torch.randn(n, v, generator=generator(seed), dtype=torch.float64)).to(dtype).to(device)


def random_embedding(v: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(v, d, generator=generator(seed), dtype=torch.float32).to(dtype).to(device)


def random_keys(n: int, device: str = "cpu", seed: int = 2) -> Tensor:
    """(seed, step, iteration, position) rows; seeds use all 64 bits, iterations include the commit's -1."""
    g = generator(seed)
    seeds = torch.randint(-(2**62), 2**62, (n,), generator=g)
    steps = torch.randint(0, 128, (n,), generator=g)
    iterations = torch.randint(-1, 3, (n,), generator=g)
    return torch.stack([seeds, steps, iterations, torch.arange(n)], dim=1).to(device)


def position_keys(n: int, device: str = "cpu", seed: int = 12345) -> Tensor:
    """n keys that differ in their position only."""
    keys = torch.zeros(n, 4, dtype=torch.int64)
    keys[:, 0], keys[:, 3] = seed, torch.arange(n)
    return keys.to(device)


def cpu(*tensors):
    return [t.cpu() if isinstance(t, Tensor) else t for t in tensors]


def double(*tensors):
    """fp64 CPU copies of the floating-point tensors; anything else as it is (on the CPU)."""
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in cpu(*tensors)]


def logsumexp(logits: Tensor, temperature: float) -> Tensor:
    """The fp64 logsumexp, rounded to what the operators take."""
    exact = (logits.double() / temperature).logsumexp(dim=1)
    return exact.to(reference.accumulator_dtype(logits))


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    actual, exact = double(actual, exact)
    return float((actual - exact).norm() / exact.norm().clamp(min=1e-300))


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal bit for bit up to the sign of zero, NaN equal to NaN."""
    torch.testing.assert_close(
        actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True, msg=lambda message: f"{what}: {message}"
    )


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "", slack: float = 0.0) -> None:
    """The rule of the project: at most twice the error of PyTorch at the same dtypes (``plain``), in L2 and maximum.

    A few roundings of the result's dtype are granted on top, since ``plain`` may be right by luck; in fp64 no more
    than 1e-11 of the size of the result is granted. ``slack`` is an absolute allowance.
    """
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == plain.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(plain.shape)}"
    if actual.numel() == 0:
        return
    rounding = 1e-11 if actual.dtype == torch.float64 else 4 * torch.finfo(actual.dtype).eps
    factor = 0.0 if actual.dtype == torch.float64 else 2.0
    actual, plain, exact = double(actual, plain, exact)
    nan = torch.isnan(exact)
    assert torch.equal(torch.isnan(actual), nan), f"{what}: NaN where the reference has none, or the reverse"
    same = nan | (actual == exact)  # infinities agree exactly or not at all
    difference = torch.where(same, 0.0, actual - exact)
    plain_difference = torch.where(nan | (plain == exact), 0.0, plain - exact)
    size = torch.where(torch.isfinite(exact), exact, 0.0)
    for name, order in (("L2", 2.0), ("maximum", math.inf)):
        error, allowed = (float(torch.linalg.vector_norm(t, order)) for t in (difference, plain_difference))
        scale = float(torch.linalg.vector_norm(size, order))
        limit = factor * allowed + rounding * scale + slack
        assert error <= limit, f"{what}: {name} error {error:.3e} > {limit:.3e} (PyTorch's: {allowed:.3e})"


def entropy_rounding(entropy: Tensor) -> float:
    """Slack for entropies in nats, in L2 over the rows: a few roundings of 1, of which they are differences."""
    return (1e-12 if entropy.dtype == torch.float64 else 5e-7) * math.sqrt(entropy.numel())


def layouts(logits: Tensor) -> dict[str, Tensor]:
    """The same values with a row stride beyond V, at an unaligned storage offset, and both."""
    n, v = logits.shape
    strided = torch.full((n, v + 7), math.nan, dtype=logits.dtype, device=logits.device)
    unaligned = torch.full((n * v + 1,), math.nan, dtype=logits.dtype, device=logits.device)
    both = torch.full((n * (v + 3) + 1,), math.nan, dtype=logits.dtype, device=logits.device)
    views = {
        "strided": strided[:, :v],
        "unaligned": unaligned[1:].view(n, v),
        "both": both[1:].view(n, v + 3)[:, :v],
    }
    for view in views.values():
        view.copy_(logits)
    return views
