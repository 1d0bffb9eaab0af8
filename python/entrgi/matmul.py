"""Products of fp32 matrices on CPUs where torch's usual library is slow.

On AMD processors MKL runs fp32 products at about half the speed of oneDNN, which torch ships as well but uses only
where it is allowed a reduced precision. A processor without AMX has no reduced mode: there the permission changes the
library and nothing else, and the products stay fp32. That is probed, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """fp32 matrix products on the CPU through the faster library, where they stay fp32; as it was afterwards.

    The setting belongs to the process, so products of other threads take the same path meanwhile, and of several
    generations in threads the last to end restores it.
    """
    if device.type != "cpu" or not _onednn_is_faster():
        yield
        return
    with _permission:
        yield


class _Permission:
    """Lets oneDNN take fp32 products, from the first that enters to the last that leaves."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = Lock(), 0, ""

    def __enter__(self) -> None:
        settings = torch.backends.mkldnn.matmul
        with self.lock:
            if not self.users:
                self.before, settings.fp32_precision = settings.fp32_precision, "bf16"
            self.users += 1

    def __exit__(self, *_exception: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.backends.mkldnn.matmul.fp32_precision = self.before


_permission = _Permission()


@cache
def _onednn_is_faster() -> bool:
    """Decided by what the processor is, not by a stopwatch: the same machine always gives the same bits."""
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not available or not hasattr(settings, "fp32_precision") or not _is_amd():
        return False
    with _permission:
        return products_are_exact(torch.matmul)


def products_are_exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether ``product`` of fp32 matrices uses all 24 bits of its operands: bf16 keeps 8 of them, TF32 11."""
    left = torch.full((64, 256), 1 + 2.0**-12)
    return torch.equal(product(left, torch.eye(256)), left)


def _is_amd() -> bool:
    information = Path("/proc/cpuinfo")
    return information.is_file() and "AuthenticAMD" in information.read_text()
