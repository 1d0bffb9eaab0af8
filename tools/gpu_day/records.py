"""One JSON line for everything that begins and ends, on disk before anything else happens."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

# How a case ends. What is neither right nor measured is named in the table's last lines.
RIGHT, WRONG, HANG, FAILED, SKIPPED, STOPPED = "right", "wrong", "hang", "failed", "skipped", "stopped"
FINE = (RIGHT,)
LARGEST_FILE = 15 << 20  # bytes: larger ones may not come home
TAIL = 200_000  # bytes of a child's log that are kept


class Records:
    """Writes ``records.jsonl``; several calls on one day go on in the same file."""

    def __init__(self, folder: Path, start: float | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "records.jsonl"
        self.start = time.monotonic() if start is None else start
        self.file = self.path.open("a")

    @property
    def clock(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def write(self, event: str, **fields: object) -> None:
        line = json.dumps({"event": event, "at": round(self.clock, 2), **fields}, default=str)
        self.file.write(line + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def keep(self, log: Path, name: str, title: str) -> None:
        """Adds the end of a log to ``name``, which comes home."""
        if not log.exists() or log.stat().st_size == 0:
            return
        target = self.folder / name
        with log.open("rb") as source:
            source.seek(max(0, log.stat().st_size - TAIL))
            text = source.read()
        if target.exists() and target.stat().st_size + len(text) > LARGEST_FILE:
            return
        with target.open("ab") as file:
            file.write(f"\n==== {title} ({self.clock:.0f} s)\n".encode() + text)


def read(path: Path) -> list[dict]:
    """All records of a file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def outcomes(records: list[dict]) -> list[dict]:
    """The last ``end`` of every case, in order; what began and never ended was stopped with the run."""
    found: dict[tuple, dict] = {}
    for record in records:
        if record["event"] not in ("begin", "end"):
            continue
        key = (record["phase"], record["case"])
        if record["event"] == "end":
            found[key] = {**record}
        elif key not in found:
            found[key] = {**record, "status": STOPPED, "why": "the run ended here"}
    return list(found.values())
