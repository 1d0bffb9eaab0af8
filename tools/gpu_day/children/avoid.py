"""What is not launched again: plans that hung or gave wrong results."""

from __future__ import annotations

import os

from operator_bench.cases import Case
from plan_variants import plan_of
from serve import Answers

# Of a GPU its own plans, which depend on the clusters that it holds.
ARCH = None if os.environ.get("GPU_DAY_DEVICE") == "cuda" else 90


def avoided(plan: dict, case: Case, avoid: list[dict]) -> str:
    """Why a plan must not run, empty where it may. An entry of ``avoid`` names fields of a plan, and the reason."""
    facts = {**plan, "logits": case.logits, "embedding": case.embedding}
    for entry in avoid:
        fields = {name: value for name, value in entry.items() if name != "why"}
        if all(facts.get(name) == value for name, value in fields.items()):
            return entry["why"]
    return ""


def announce(plans: list[dict], case: Case, answers: Answers) -> None:
    plans = [{**plan, "logits": case.logits, "embedding": case.embedding} for plan in plans]
    answers.note(plans=plans, launching=True)


def plans_of(case: Case) -> list[dict]:
    """Of all parts of a case; forced plans are the forced ones."""
    return [plan_of(case, ARCH, part) for part in range(len(case.what.parts))]


def avoided_case(case: Case, avoid: list[dict], answers: Answers) -> str:
    """:func:`avoided` for the plans of all parts of a case, which the parent is told beforehand."""
    plans = plans_of(case)
    announce(plans, case, answers)
    return next(filter(None, (avoided(plan, case, avoid) for plan in plans)), "")
