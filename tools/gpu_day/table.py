"""What happened, in few lines: the end of the output, and all that may be left of a run."""

from __future__ import annotations

from collections import Counter

from .records import FAILED, HANG, RIGHT, STOPPED, WRONG, outcomes

TIMED = ("bench", "forced", "step")
MOST_CHARACTERS = 11_000


def table(records: list[dict]) -> str:
    """Kernels right or not; times beside floors and baselines; what is open."""
    found = outcomes(records)
    run = next((record for record in records if record["event"] == "run"), {})
    lines = [
        f"commit {run.get('commit')}, {run.get('on')}" + (" (a dry run: no times of a GPU)" if run.get("dry") else "")
    ]
    for part in (_counts(found), _troubles(found, records), _ceilings(found), _times(found)):
        lines += [*part, ""]
    text = "\n".join(lines).rstrip()
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n... (records.jsonl has all of it)"


def _counts(found: list[dict]) -> list[str]:
    lines = []
    for phase in dict.fromkeys(each["phase"] for each in found):
        counts = Counter(each["status"] for each in found if each["phase"] == phase)
        lines.append(f"{phase:12s} " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return lines


def _ceilings(found: list[dict]) -> list[str]:
    lines = []
    for each in found:
        if each["phase"] == "ceilings" and each.get("per_second"):
            rate, unit = (1e9, "GB/s") if each["case"] in ("copy", "read") else (1e12, "TFLOP/s")
            lines.append(f"{each['case']:40s} {each['ms']:9.3f} ms {each['per_second'] / rate:9.1f} {unit}")
        elif each["case"] == "clusters" and each.get("resident"):
            lines.append(f"clusters resident: {each['resident']}")
    return lines


def _times(found: list[dict]) -> list[str]:
    lines = [f"{'us':44s} {'entrgi':>9s} {'floor':>9s} {'ratio':>6s}  others"]
    for each in found:
        rows = each.get("rows") or []
        if each["phase"] not in TIMED or each["status"] != RIGHT or not rows or not rows[0].get("median_ms"):
            continue
        ours = rows[0]
        others = [f"{row['implementation']} {1e3 * row['median_ms']:.0f}" for row in rows[1:] if row.get("median_ms")]
        floor, ratio = (1e3 * ours["floor_ms"], ours["over_floor"]) if ours.get("floor_ms") else (0.0, 0.0)
        lines.append(
            f"{each['case'][:44]:44s} {1e3 * ours['median_ms']:9.1f} {floor:9.1f} {ratio:6.2f}  {', '.join(others)}"
        )
    for each in found:
        if each.get("seconds_per_step"):
            lines.append(f"{each['case'][:44]:44s} {each['seconds_per_step']:9.4f} s a step")
    return lines if len(lines) > 1 else ["nothing was timed"]


def _troubles(found: list[dict], records: list[dict]) -> list[str]:
    lines = [f"libraries: {each['source']}" for each in found if each.get("source")]
    for each in found:
        if each["status"] in (WRONG, HANG, FAILED, STOPPED):
            lines.append(f"{each['status'].upper()} {each['phase']}: {each['case']}: {str(each.get('why', ''))[:200]}")
            lines += [f"    {name}" for name in each.get("failed", [])[:10]]
    for record in records:
        if record["event"] == "cut":
            lines.append(f"cut off: {record['left']} of {record['of']} cases of {record['phase']} were not reached")
        elif record["event"] == "stop":
            lines.append(f"STOPPED in {record['phase']}: {record['why']}")
        elif record["event"] == "error":
            lines.append(f"ERROR in {record['phase']}: {record['why'].strip().splitlines()[-1]}")
    return lines
