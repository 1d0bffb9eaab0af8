"""Rows of results: one for each implementation of a case, in a CSV file after every case, in JSON at the end."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

from .cases import Case

FOLDER = Path(__file__).resolve().parents[1] / "results"
COLUMNS = (
    *("operator", "N", "V", "d", "logits", "embedding", "implementation", "median_ms", "noise", "timing", "events_ms"),
    *("copy_ms", "gemm_ms", "floor_ms", "bound", "over_floor", "peak_MiB", "workspace_MiB", "error"),
    *("over_published", "over_compiled", "over_composed", "target", "met", "status"),
    *("kind", "device", "driver", "threads", "load_average", "torch", "commit", "forced"),
)
NUMBERS = {
    *(
        "N",
        "V",
        "d",
        "median_ms",
        "events_ms",
        "noise",
        "copy_ms",
        "gemm_ms",
        "floor_ms",
        "over_floor",
        "peak_MiB",
        "error",
    ),
    *("over_published", "over_compiled", "over_composed", "workspace_MiB", "threads", "load_average"),
}
SAME = ("device", "threads", "torch", "commit", "forced")  # of two rows that one table may hold
Row = dict[str, object]


def path_for(device_name: str | None) -> Path:
    """Without suffix: ``operators_cpu`` or ``operators_<gpu>``."""
    return FOLDER / f"operators_{re.sub('[^a-z0-9]+', '_', (device_name or 'cpu').lower()).strip('_')}"


def case_key(row: Row) -> tuple:
    return tuple(row[name] for name in ("operator", "N", "V", "d", "logits", "embedding"))


def read(path: Path) -> list[Row]:
    file = path.with_suffix(".csv")
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{name: _parsed(name, row.get(name) or "") for name in COLUMNS} for row in csv.DictReader(lines)]


def _parsed(name: str, text: str) -> object:
    if text == "" or name not in NUMBERS:
        return text or None
    number = float(text)
    return int(number) if name in ("N", "V", "d", "threads") else number


def write(path: Path, rows: list[Row], suffixes: tuple[str, ...] = (".csv", ".json")) -> None:
    """Each file is replaced at once: an interrupted run leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        draft = path.with_suffix(f"{suffix}.part")
        with draft.open("w", newline="") as file:
            if suffix == ".json":
                file.write(json.dumps(rows, indent=1) + "\n")
            else:
                table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        os.replace(draft, path.with_suffix(suffix))


class Results:
    """The rows at ``path``. A case that is measured again replaces its rows; other rows stay."""

    def __init__(self, path: Path, about: Row):
        self.path, self.about, self.added = path, about, 0
        self.cases: dict[tuple, list[Row]] = {}
        for row in read(path):
            self.cases.setdefault(case_key(row), []).append(row)

    def has(self, case: Case) -> bool:
        """Whether the case was measured here, with this code: never where no commit names the code."""
        commit = str(self.about["commit"])
        if commit == "none" or commit.endswith("-dirty"):
            return False
        rows = self.cases.get(case.key, [])
        return bool(rows) and all(row[name] == self.about[name] for row in rows for name in SAME)

    def add(self, case: Case, rows: list[Row]) -> None:
        self.cases[case.key] = [{name: {**row, **self.about}.get(name) for name in COLUMNS} for row in rows]
        self.added += 1
        write(self.path, self.rows, (".csv",))

    def save(self) -> None:
        write(self.path, self.rows)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.cases.values() for row in rows]


def beside(ours: Row, how: str | None) -> float:
    """Our milliseconds as the other was timed: by events where it was, with the same delays of the host."""
    return float(ours["events_ms"] if str(how).startswith("events") and ours.get("events_ms") else ours["median_ms"])


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")
