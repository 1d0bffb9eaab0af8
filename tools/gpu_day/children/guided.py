"""The first steps of whole guided generations, variant by variant, on one pair of models."""

from __future__ import annotations

import gc
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import end_to_end  # noqa: E402
import torch  # noqa: E402
from serve import Answers, serve  # noqa: E402

DEVICE = os.environ["GPU_DAY_DEVICE"]
WARM_UP_STEPS = 2
runner: end_to_end.Runner | None = None


def build(workload: str, steps: int) -> dict:
    global runner
    chosen = {**end_to_end.WORKLOADS, **end_to_end.SMOKE}[workload]
    runner = end_to_end.Runner(replace(chosen, device=DEVICE, taken=steps))
    return {"status": "right", "models": chosen.models, "steps": steps}


def variant(variant: str, repeats: int) -> dict:
    """Seconds for a denoising step, peak memory above the models, and the parts of a step where they can be seen."""
    on_cuda = DEVICE == "cuda"
    steps = runner.workload.taken
    gc.collect()
    runner.run(variant, 0, taken=WARM_UP_STEPS)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        models = torch.cuda.memory_allocated()
    seconds = [runner.timed(variant, repeat)[0] / steps for repeat in range(repeats)]
    answer = {"status": "right", "seconds_per_step": statistics.median(seconds), "runs": seconds}
    if on_cuda:
        answer["peak_MiB"] = (torch.cuda.max_memory_allocated() - models + runner.held_bytes(variant)) / 2**20
    if parts := runner.split(variant):
        answer["parts"] = {part: value / steps for part, value in parts.items()}
    return answer


if __name__ == "__main__":
    answers = Answers()
    torch.set_num_threads(int(os.environ.get("GPU_DAY_THREADS", "1")))
    serve(answers, {"build": build, "variant": variant})
