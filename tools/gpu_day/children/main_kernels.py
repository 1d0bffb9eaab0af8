"""The operators at full size on the device: all rows against fp64 computed there, and twice the same bits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

import torch  # noqa: E402
from avoid import avoided_case  # noqa: E402
from judge import judge  # noqa: E402
from operator_bench import ours  # noqa: E402
from operator_bench.cases import CHECKED_LR, CHECKED_SGD_LR, Case, Inputs  # noqa: E402
from serve import Answers, serve  # noqa: E402

DEVICE = torch.device(os.environ["GPU_DAY_DEVICE"])


def check(case: dict, embedding: str, avoid: list[dict]) -> dict:
    """``embedding`` is "random", or "positive": sums without cancellation, in which nothing can be missing unseen."""
    case = Case(**case)
    if why := avoided_case(case, avoid, answers):
        return {"status": "skipped", "why": why}
    x = Inputs(case, DEVICE, lr=CHECKED_SGD_LR if case.operator == "sgd_step" else CHECKED_LR)
    if embedding == "positive":
        x.embedding = x.embedding.abs() + 0.5
    first, second = ours.CALLS[case.operator](x, 0)(), ours.CALLS[case.operator](x, 0)()
    answer = judge(x, first)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # other processes measure beside this one
    changed = [key for key in first if not torch.equal(_bits(first[key]), _bits(second[key]))]
    if changed:
        answer = {
            **answer,
            "status": "wrong",
            "why": f"{', '.join(changed)}: other bits the second time; {answer['why']}",
        }
    return answer


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


if __name__ == "__main__":
    answers = Answers()
    torch.set_num_threads(int(os.environ.get("GPU_DAY_THREADS", "1")))
    serve(answers, {"check": check})
