"""The random numbers of the draws, in plain PyTorch: Philox, and Gumbel noise made from its words.

Every (row of keys, vocabulary id) has one value, whatever else is computed beside it. ``csrc/cpu/philox.h`` and
``csrc/kernels/detail/philox.cuh`` are the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011) on int64 tensors that hold unsigned 32-bit words."""
    c, k = [word & MASK32 for word in counter], [word & MASK32 for word in key]
    for _ in range(10):
        low0, low1 = c[0] * PHILOX_MULTIPLIERS[0], c[2] * PHILOX_MULTIPLIERS[1]
        high0, high1 = (low0 >> 32) & MASK32, (low1 >> 32) & MASK32
        c = [high1 ^ c[1] ^ k[0], low1 & MASK32, high0 ^ c[3] ^ k[1], low0 & MASK32]
        k = [(k[0] + PHILOX_WEYL[0]) & MASK32, (k[1] + PHILOX_WEYL[1]) & MASK32]
    return c


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, fp64 [N, len(ids)], one draw for every (row key, id).

    ``keys`` int64 [N, 4] holds (trajectory seed, denoising step, iteration, absolute position). A 64-bit
    uniform u gives -log(-log1p(-u)); its upper half is taken through 1 - u so that neither tail is lost.
    """
    seed, step, iteration, position = (keys[:, i, None] for i in range(4))
    counter = torch.broadcast_tensors(ids[None, :], position, iteration, step)
    x = philox(counter, (seed, seed >> 32))
    low, high = x[0], x[1]
    upper = high >= 2**31
    high, low = torch.where(upper, MASK32 - high, high), torch.where(upper, MASK32 - low, low)
    v = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    return -torch.log(torch.where(upper, -torch.log(v), -torch.log1p(-v)))
