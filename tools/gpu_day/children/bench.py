"""The operator benchmark, case by case: every implementation checked, then timed together with its floors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import torch  # noqa: E402
from avoid import avoided_case  # noqa: E402
from operator_bench import ours  # noqa: E402
from operator_bench.cases import TEMPERATURE, TOP_P, Case, Inputs  # noqa: E402
from operator_bench.correctness import WrongResult  # noqa: E402
from operator_bench.measure import Settings, measure_case  # noqa: E402
from operator_bench.timing import Limits, measure, measuring_stream, sets_beyond_cache  # noqa: E402
from serve import Answers, serve  # noqa: E402

import entrgi_ext as ops  # noqa: E402

DEVICE = torch.device(os.environ["GPU_DAY_DEVICE"])
INPUTS_SPREAD = 3.0  # of the logits of ``Inputs``
FORBIDDEN = 397  # ids that the sampler never draws: Dream's mask and the ids of its embedding without a token


def case(case: dict, seconds: float, avoid: list[dict], compile: str = "none", only: tuple[str, ...] = ()) -> dict:
    """Rows of the benchmark's results for one case."""
    case = Case(**case)
    if why := avoided_case(case, avoid, answers):
        return {"status": "skipped", "why": why}
    if compile != "none":
        torch._functorch.config.donated_buffer = False  # one forward pass, many backward passes
    limits = Limits(seconds, least=3, most=40)
    _launch_once(case)
    try:
        rows = measure_case(case, Settings(DEVICE, limits, compile, compile_seconds=30.0, only=tuple(only)))
    except WrongResult as wrong:
        return {"status": "wrong", "why": str(wrong)}
    return {"status": "right", "rows": rows}


def _launch_once(case: Case) -> None:
    """What hangs, hangs here; after this the process waits for PyTorch too."""
    ours.CALLS[case.operator](Inputs(case, DEVICE), 0)()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    answers.note(launching=False)


def draw(case: dict, spread: float, forbidden: bool, seconds: float, avoid: list[dict]) -> dict:
    """A top-p draw from logits of some spread: the flatter, the more ids are in the nucleus."""
    case = Case(**case)
    if why := avoided_case(case, avoid, answers):
        return {"status": "skipped", "why": why}
    work, _ = case.floor()
    with measuring_stream(DEVICE):
        x = Inputs(case, DEVICE, sets_beyond_cache(work, DEVICE))
        x.logits.mul_(spread / INPUTS_SPREAD)
        never = None
        if forbidden:
            never = torch.zeros(case.V, dtype=torch.bool, device=DEVICE)
            never[-min(FORBIDDEN, case.V // 4) :] = True
        keys, logits = x.keys, x.logits
        source = torch.randn(x.sets, max(work // 8, 1), device=DEVICE)
        target = source.clone()
        calls = {
            "entrgi": [lambda z=z: ops.sample_tokens(z, keys, TEMPERATURE, TOP_P, forbidden=never) for z in logits],
            "copy": [lambda a=a, b=b: b.copy_(a) for a, b in zip(source, target, strict=True)],
        }
        for call in (call for each in calls.values() for call in each):
            call()  # warms up
        times = measure(calls, dict.fromkeys(calls, True), DEVICE, Limits(seconds, least=3, most=40))
    for name in times:
        if times[name].failure is not None:
            raise times[name].failure
    mine, copy = times["entrgi"], times["copy"].median
    row = {"median_ms": mine.median, "noise": mine.noise, "timing": mine.how}
    return {"status": "right", "rows": [{**row, "copy_ms": copy, "floor_ms": copy, "over_floor": mine.median / copy}]}


if __name__ == "__main__":
    answers = Answers()
    torch.set_num_threads(int(os.environ.get("GPU_DAY_THREADS", "1")))
    serve(answers, {"case": case, "draw": draw})
