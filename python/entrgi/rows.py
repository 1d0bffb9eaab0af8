"""Matrices of logits as the CUDA kernels like them: every row starts at a 16-byte boundary.

Copies in bulk, which the fast kernels for Hopper are made of, ask for that; a vocabulary of 30,522 or of an odd number
of ids has such rows only where there is room between them. The CPU operators are as fast either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDARY = 16  # bytes


def empty_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix [count, width] with aligned rows: its row stride may exceed its width."""
    step = BOUNDARY // dtype.itemsize
    return torch.empty(count, -(-width // step) * step, dtype=dtype, device=device)[:, :width]


def with_aligned_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` itself where it is of ``dtype`` and its rows are aligned, else a copy that is."""
    aligned = matrix.data_ptr() % BOUNDARY == 0 and matrix.stride(0) * matrix.element_size() % BOUNDARY == 0
    if matrix.dtype == dtype and aligned and matrix.stride(1) == 1:
        return matrix
    return empty_rows(matrix.shape[0], matrix.shape[1], dtype, matrix.device).copy_(matrix)
