"""What the machine can do at best, measured: bytes copied and multiply-adds per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

SECONDS = 0.15  # of measuring, for each rate
SMALLEST_COPY = {"cpu": 8 << 20, "cuda": 512 << 20}  # below, calls and the GPU's caches are measured instead
LARGEST_COPY = 1 << 30
LARGEST_MATMUL = {"cpu": 2048, "cuda": 8192}
ENOUGH_SECONDS = 0.03  # a product that takes so long on the CPU is large enough


@dataclass(frozen=True)
class Rates:
    """The denominators of all floors.

    Attributes:
        copy: bytes per second, read and written ones counted, of a copy between two buffers.
        copy_bytes: size of those buffers together.
        matmul: FLOPs per second of a square matrix product, by dtype ("float32", ...), fp32 at torch's current
            precision setting.
    """

    copy: float
    copy_bytes: int
    matmul: dict[str, float]

    def seconds(self, work_bytes: float, flops: Mapping[str, float]) -> tuple[float, str]:
        """(seconds, ``bytes`` or ``flops``): the longer of moving so many bytes and of the FLOPs of each dtype."""
        moving = work_bytes / self.copy
        computing = sum(count / self.matmul[dtype] for dtype, count in flops.items())
        return (moving, "bytes") if moving >= computing else (computing, "flops")


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype], working_set: int) -> Rates:
    """Measure copy bandwidth and matrix products on ``device``.

    Args:
        dtypes: of the products.
        working_set: bytes that a denoising step goes through; the copy is as large (8 MiB on the CPU or 512 MiB on
            CUDA to 1 GiB), so that what stays in a CPU's caches from one step to the next is measured there.
    """
    size = min(max(working_set, SMALLEST_COPY.get(device.type, 8 << 20)), LARGEST_COPY)
    # Ones, not fresh pages: those might all be the same page of zeros.
    source = torch.ones(size // 8, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source), device)
    matmul = {str(dtype).removeprefix("torch."): _matmul_rate(dtype, device) for dtype in dtypes}
    return Rates(copy, 2 * source.nbytes, matmul)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    best, largest = 0.0, LARGEST_MATMUL.get(device.type, 2048)
    size = 256 if device.type == "cpu" else largest
    while size <= largest:
        # Small integers: every dtype holds them, and no result is a subnormal.
        a, b = (torch.randint(-2, 3, (size, size), device=device).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        seconds = fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > ENOUGH_SECONDS:
            break
        size *= 2
    return best


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many calls after a warm-up: what is asked for is what the machine is able to do."""
    clock = _cuda_seconds if device.type == "cuda" else _host_seconds
    call()
    best, end = clock(call, device), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, clock(call, device))
    return best


def _host_seconds(call: Callable[[], object], _device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Of one call on the device, launched often enough that the host keeps ahead."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
    return 1e-3 * start.elapsed_time(stop) / calls
