"""Four launches for a profiler: relaxed embedding 512, update 512, update 8, draw 64. Started under ncu."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import torch  # noqa: E402
from operator_bench import ours  # noqa: E402
from operator_bench.cases import TIMED_LR, Case, Inputs  # noqa: E402

if __name__ == "__main__":
    device, vocabulary, width = torch.device(os.environ["GPU_DAY_DEVICE"]), int(sys.argv[1]), int(sys.argv[2])
    for operator, rows in (
        ("relaxed_embedding", 512),
        ("adam_step_middle", 512),
        ("adam_step_middle", 8),
        ("sample_tokens", 64),
    ):
        d = 0 if operator == "sample_tokens" else width
        call = ours.CALLS[operator](
            Inputs(Case(operator, rows, vocabulary, d, "bfloat16", "bfloat16"), device, lr=TIMED_LR), 0
        )
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
