"""Answers made up, to try out the parent where there is neither a GPU nor the simulator. Needs nothing."""

from __future__ import annotations

import sys
import time

from serve import Answers, serve

KERNELS = (("relaxed_embedding", "embed_a"), ("relaxed_embedding", "embed_b"), ("adam_step_middle", "update_a"))
RUNS = {"relaxed_embedding": "embed_a", "adam_step_middle": "update_a", "logit_gradient": "update_b"}


def plan_of(kernel: str) -> dict:
    return {"kernel": kernel, "block_m": 64, "block_n": 64, "cluster_m": 1, "cluster_n": 1}


def enumerate_all(arch: int, small: bool) -> dict:
    case = {"N": 7, "V": 50, "d": 8, "logits": "bfloat16", "embedding": "bfloat16"}
    cases = [
        {
            "family": "all",
            "name": f"{operator}: {kernel} {i}",
            "plan": plan_of(kernel),
            "rank": 0,
            "case": {**case, "operator": operator},
        }
        for operator, kernel in KERNELS
        for i in range(3)
    ]
    return {"status": "right", "cases": cases}


def checked(kernels: list[str], avoid: list[dict], planted: str = "") -> dict:
    for entry in avoid:
        fields = {name: value for name, value in entry.items() if name != "why"}
        if any(fields.items() <= plan_of(kernel).items() for kernel in kernels):
            return {"status": "skipped", "why": entry["why"]}
    answers.note(plans=[plan_of(kernel) for kernel in kernels], launching=True)
    if planted == "hang":
        time.sleep(1e6)
    if planted == "wrong":
        return {"status": "wrong", "why": "planted"}
    return {"status": "right", "errors": {}}


def check(avoid: list[dict], variant: dict | None = None, case: dict | None = None, planted: str = "", **_more) -> dict:
    kernels = kernels_of(case) if variant is None else [variant["plan"]["kernel"]]
    return checked(kernels, avoid, planted)


def kernels_of(case: dict) -> list[str]:
    if case["operator"] == "adam_iteration":
        return ["vocab_a", "embed_a", "update_a"]
    return [RUNS.get(case["operator"], "vocab_a")]


def timed(case: dict, avoid: list[dict], **_more) -> dict:
    row = {**case, "implementation": "entrgi", "median_ms": 1.0, "floor_ms": 0.5, "over_floor": 2.0, "copy_ms": 0.5}
    answer = checked(kernels_of(case), avoid)
    return {**answer, "rows": [row]} if answer["status"] == "right" else answer


def fine(**_request) -> dict:
    return {"status": "right"}


def rate(**_request) -> dict:
    return {"status": "right", "ms": 1.0, "per_second": 1e12}


def step(**_request) -> dict:
    return {"status": "right", "seconds_per_step": 0.1}


if __name__ == "__main__":
    answers = Answers()
    print("stub of", sys.argv[1])
    handlers = {"enumerate": enumerate_all, "check": check, "case": timed, "draw": timed}
    handlers |= dict.fromkeys(("copy", "read", "product"), rate) | dict.fromkeys(("device", "findings", "build"), fine)
    serve(answers, {**handlers, "variant": step})
