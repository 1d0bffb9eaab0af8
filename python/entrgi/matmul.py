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
from typing import Any

import torch
from torch import Tensor

from entrgi.deprecation import former_names
from entrgi.held import HeldSetting


@contextmanager
def onednn_matmul(device: torch.device) -> Iterator[None]:
    """While the context is open, fp32 matrix products on the CPU run through oneDNN where that is faster and exact.

    :func:`entrgi.generate` opens it by itself. It sets a flag of the whole process
    (``torch.backends.mkldnn.matmul.fp32_precision``), so products of other threads take the same path meanwhile. The
    flag is restored at the end, by the last of several generations in threads, unless somebody else has set it
    meanwhile. On other processors than AMD's without AMX, and for other devices than the CPU, nothing is done.

    Args:
        device: where the products are.
    """
    if device.type != "cpu" or not _onednn_is_faster():
        yield
        return
    with _permission:
        yield


_mkldnn: Any = torch.backends.mkldnn  # whose setting torch makes at run time


def _read() -> str:
    return _mkldnn.matmul.fp32_precision


def _write(precision: str) -> None:
    _mkldnn.matmul.fp32_precision = precision


_permission = HeldSetting(_read, _write, "bf16")  # lets oneDNN take fp32 products


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


__getattr__ = former_names(__name__, {"fast_products": "entrgi.matmul.onednn_matmul"})
