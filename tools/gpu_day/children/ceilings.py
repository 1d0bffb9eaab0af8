"""What the device can do at best: needs PyTorch and nothing of this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import torch  # noqa: E402
from operator_bench.timing import Limits, measure, measuring_stream  # noqa: E402
from serve import Answers, serve  # noqa: E402

DEVICE = torch.device(os.environ["GPU_DAY_DEVICE"])
SECONDS = 0.4


def device() -> dict:
    about = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_MiB": properties.total_memory >> 20,
            "l2_MiB": properties.L2_cache_size >> 20,
        }
    return {"status": "right", **about}


def copy(bytes: int) -> dict:
    """Device to device; bytes read and written."""
    source = torch.randn(bytes // 4, device=DEVICE)
    target = source.clone()
    return _rate(lambda: target.copy_(source), 2 * bytes)


def read(bytes: int) -> dict:
    """A sum: bytes read."""
    source = torch.randn(bytes // 4, device=DEVICE)
    return _rate(lambda: source.sum(), bytes)


def product(m: int, k: int, n: int, transposed: bool) -> dict:
    """bf16 [m, k] x [k, n], random; ``transposed``: the right one is stored [n, k]."""
    dtype = torch.bfloat16
    left = torch.randn(m, k, device=DEVICE, dtype=dtype)
    right = (
        torch.randn(n, k, device=DEVICE, dtype=dtype).T if transposed else torch.randn(k, n, device=DEVICE, dtype=dtype)
    )
    out = torch.empty(m, n, device=DEVICE, dtype=dtype)
    return _rate(lambda: torch.mm(left, right, out=out), 2 * m * k * n)


def _rate(call, amount: int) -> dict:
    with measuring_stream(DEVICE):
        call(), call()
        times = measure({"it": [call]}, {"it": False}, DEVICE, Limits(SECONDS, least=5))["it"]
    if times.failure is not None:
        raise times.failure
    return {"status": "right", "ms": times.median, "noise": times.noise, "per_second": amount / times.median * 1e3}


if __name__ == "__main__":
    answers = Answers()
    torch.set_num_threads(int(os.environ.get("GPU_DAY_THREADS", "1")))
    serve(answers, {"device": device, "copy": copy, "read": read, "product": product})
