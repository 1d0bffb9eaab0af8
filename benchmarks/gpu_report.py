"""What the GPU day brought home, as tables, a plot, and the figures of the README and of the kernels' pages.

    python benchmarks/gpu_report.py OUT/records.jsonl [MORE ...]     # from one or more calls on the same device
    python benchmarks/gpu_report.py                                  # again, from benchmarks/results/gpu_*.jsonl
    python benchmarks/gpu_report.py RECORDS --output FOLDER          # all of it there; README and pages stay

Writes ``benchmarks/results/gpu_<device>.{jsonl,csv,json,png}`` and what stands between ``<!-- gpu:begin -->`` and
``<!-- gpu:end -->`` in the README and in ``docs/kernels/README.md``; between ``<!-- gpu:begin FAMILY -->`` and its end,
on any page there, the operators whose names begin with FAMILY, such as ``relaxed_embedding``. What was expected, in
``gpu_expected.json``, stands beside what was measured. Records of a dry run go nowhere but to ``--output``, and say
what they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from gpu_day.records import FAILED, HANG, RIGHT, SKIPPED, STOPPED, WRONG, outcomes, read  # noqa: E402

RESULTS, EXPECTED = ROOT / "benchmarks" / "results", Path(__file__).with_name("gpu_expected.json")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "kernels").glob("*.md")))
MARKED = re.compile(r"(<!-- gpu:begin ?(\w*) -->\n)(.*?)(<!-- gpu:end -->)", re.DOTALL)
NOTHING = "Nothing has been measured on a GPU yet."
CHECKED, TIMED = ("smoke", "main"), ("bench", "step", "forced")
TROUBLE = (WRONG, HANG, FAILED, STOPPED)
COLUMNS = (
    *("phase", "case", "status", "why", "kernels", "median_us", "noise", "timing", "floor_us", "over_floor", "bound"),
    *("expected_low_us", "expected_high_us", "published_us", "composed_us", "compiled_us", "error", "peak_MiB"),
    *("ms", "per_second", "seconds_per_step", "device", "commit"),
)


@dataclass
class Report:
    """All that is known of one device.

    Attributes:
        about: what is known of the device.
    """

    records: list[dict]
    about: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs = [record for record in self.records if record["event"] == "run"]
        devices = [record for record in self.records if record["event"] == "device"]
        if not runs:
            raise ValueError("the records hold no run")
        self.dry = any(run["dry"] for run in runs)
        names = {record["device"] for record in devices}
        if len(names) > 1:
            raise ValueError(f"the records are of several devices, {', '.join(sorted(names))}: one report each")
        for device in devices:
            self.about |= {name: value for name, value in device.items() if name not in ("event", "at")}
        self.commits = list(dict.fromkeys(run["commit"] for run in runs))
        self.found = outcomes(self.records)
        expected = json.loads(EXPECTED.read_text())
        self.expected_on = expected["on"].removeprefix("NVIDIA ")
        self.expected = {} if self.dry else {row["case"]: row for row in expected["cases"]}

    @property
    def device(self) -> str:
        return f"{'simulated: ' if self.dry else ''}{self.about.get('device', 'unknown device')}"

    @property
    def stem(self) -> str:
        name = "simulated" if self.dry else re.sub("[^a-z0-9]+", "_", self.device.lower()).strip("_")
        return f"gpu_{name}"

    def of(self, *phases: str) -> list[dict]:
        return [each for each in self.found if each["phase"] in phases]

    # ---- rows -----------------------------------------------------------------------------------------------

    def rows(self) -> list[dict]:
        """One for every case, the CSV's."""
        return [self._row(each) for each in self.found]

    def _row(self, each: dict) -> dict:
        row = {name: each.get(name) for name in COLUMNS}
        row |= {
            "device": self.device,
            "commit": ", ".join(self.commits),
            "kernels": " ".join(each.get("kernels") or []),
        }
        for place, measured in enumerate(each.get("rows") or []):
            if not measured.get("median_ms"):
                continue
            name = measured.get("implementation", "entrgi")
            if place > 0:
                row[f"{name}_us"] = round(1e3 * measured["median_ms"], 2)
                continue
            row["median_us"] = round(1e3 * measured["median_ms"], 2)
            row["floor_us"] = round(1e3 * measured["floor_ms"], 2) if measured.get("floor_ms") else None
            row |= {key: measured.get(key) for key in ("noise", "timing", "over_floor", "bound", "error", "peak_MiB")}
        if expected := self.expected.get(each["case"]):
            row["expected_low_us"], row["expected_high_us"] = expected["expected_us"]
        return {name: row[name] for name in COLUMNS}

    # ---- words ----------------------------------------------------------------------------------------------

    def heading(self) -> str:
        details = [self.device]
        if self.about.get("torch"):
            details.append(f"torch {self.about['torch']}")
        details.append(f"commit {', '.join(self.commits)}")
        text = ", ".join(details)
        return f"**A dry run, no figure is a GPU's.** {text}" if self.dry else text

    def unit(self) -> str:
        return "microseconds" + (", small shapes" if self.dry else ", V = 152,064, bf16 unless said")

    def ceilings(self) -> str:
        """What the device did at best."""
        parts = []
        for each in self.of("ceilings"):
            if each["case"] in ("copy", "read") and each.get("per_second"):
                parts.append(f"{each['case']} {each['per_second'] / 1e12:.2f} TB/s")
            elif each["case"].startswith("product") and each.get("per_second"):
                shape = each["case"].removeprefix("product ")
                parts.append(f"bf16 product {shape} {each['per_second'] / 1e12:.0f} TFLOP/s")
            elif each.get("resident"):
                counts = ", ".join(f"{count} of {size}" for size, count in each["resident"].items())
                parts.append(f"clusters at once: {counts}")
        return "; ".join(parts)

    def status(self) -> str:
        """Of every kernel: how many of its cases are right."""
        kernels: dict[str, Counter] = {}
        for each in self.of(*CHECKED):
            for kernel in dict.fromkeys(each.get("kernels") or []):
                kernels.setdefault(kernel, Counter())[each["status"]] += 1
        lines = ["| kernel | state | right | wrong | hang | failed | not run |", "|---|---|---|---|---|---|---|"]
        for kernel, counts in sorted(kernels.items()):
            failed = counts[FAILED] + counts[STOPPED]
            state = (
                "**hangs**" if counts[HANG] else "**wrong**" if counts[WRONG] else "**fails**" if failed else "right"
            )
            cells = [counts[RIGHT], counts[WRONG], counts[HANG], failed, counts[SKIPPED]]
            lines.append(f"| `{kernel}` | {state} | {' | '.join(map(str, cells))} |")
        for each in self.of("tests", "sanitize"):
            if each["phase"] == "tests" and each.get("counts"):
                counts = ", ".join(f"{count} {name.lower()}" for name, count in each["counts"].items())
                lines.append(f"| {each['case']} | {each['status']} | {counts} | | | | |")
            elif each["case"].endswith("findings"):
                lines.append(f"| {each['case']} | {each['status']} | | | | | |")
        return "\n".join(lines)

    def times(self, family: str = "") -> str:
        """Microseconds: floor, expected, measured, baselines, of the operators whose names begin so."""
        lines = [
            f"| case | floor | expected ({self.expected_on}) | **measured** | measured / floor "
            "| composed | published | compiled |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows():
            if row["phase"] not in TIMED or not row["case"].startswith(family) or not row["median_us"]:
                continue
            low, high = row["expected_low_us"], row["expected_high_us"]
            expected = "" if low is None else f"{low:g} - {high:g}"
            baselines = [_us(row[f"{name}_us"]) for name in ("composed", "published", "compiled")]
            ratio = f"{row['over_floor']:.2f}" if row["over_floor"] else ""
            cells = [row["case"], _us(row["floor_us"]), expected, f"**{_us(row['median_us'])}**", ratio, *baselines]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) if len(lines) > 2 else "Nothing was timed."

    def guided(self) -> str:
        steps = [each for each in self.of("end-to-end") if each.get("seconds_per_step")]
        if not steps:
            return ""
        lines = ["| guided generation | seconds a step | parts |", "|---|---|---|"]
        for each in steps:
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in (each.get("parts") or {}).items())
            lines.append(f"| {each['case']} | {each['seconds_per_step']:.4f} | {parts} |")
        return "\n".join(lines)

    def troubles(self) -> str:
        lines = []
        for each in self.found:
            if each["status"] in TROUBLE:
                why = " ".join(str(each.get("why") or "").split())[:300]
                lines.append(f"- {each['status']}: {each['phase']}: {each['case']}" + (f": {why}" if why else ""))
        for record in self.records:
            if record["event"] in ("cut", "stop", "error"):
                left = f"{record['left']} of {record['of']} cases not reached" if "left" in record else record["why"]
                lines.append(f"- {record['phase']}: {left}")
        return "\n".join(lines)

    def block(self, family: str = "", links: str = "") -> str:
        """What stands between the markers of a page."""
        if family:
            return f"{self.heading()}; {self.unit()}:\n\n{self.times(family)}"
        parts = [f"{self.heading()}{links}.", self.ceilings(), self.status(), f"M{self.unit()[1:]}:"]
        parts += [self.times(), self.guided(), self.troubles()]
        return "\n\n".join(part for part in parts if part)


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def plot(report: Report, file: Path) -> bool:
    """Measured time over the floor, with what was expected as a bar; False where nothing was timed."""
    rows = [row for row in report.rows() if row["phase"] in TIMED and row["median_us"] and row["floor_us"]]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        if row["expected_low_us"] is not None:
            low, high = (row[f"expected_{end}_us"] / row["floor_us"] for end in ("low", "high"))
            axis.barh(place, high - low, left=low, color="lightgray", height=0.8)
        for name, colour in (("published", "tab:red"), ("composed", "tab:purple"), ("compiled", "tab:orange")):
            if row[f"{name}_us"]:
                axis.plot(row[f"{name}_us"] / row["floor_us"], place, "|", color=colour)
        axis.plot(row["over_floor"], place, "ko", markersize=4)
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time / floor; gray: expected; red: published, purple: composed, orange: compiled")
    axis.set_title(report.heading().replace("**", ""), fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def write(report: Report, folder: Path) -> list[Path]:
    """The results' files."""
    folder.mkdir(parents=True, exist_ok=True)
    base, rows = folder / report.stem, report.rows()
    lines = [json.dumps(record) for record in report.records]
    base.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    base.with_suffix(".json").write_text(json.dumps({"about": report.about, "results": rows}, indent=1) + "\n")
    with base.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    suffixes = [".jsonl", ".json", ".csv", *([".png"] if plot(report, base.with_suffix(".png")) else [])]
    return [base.with_suffix(suffix) for suffix in suffixes]


def rewritten(page: Path, text: str, reports: list[Report]) -> str:
    """The text of a page with what stands between its markers replaced."""
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)

    def block(match: re.Match) -> str:
        parts = []
        for report in reports:
            base = f"{up}benchmarks/results/{report.stem}"
            parts.append(report.block(match[2], f"; [all of it]({base}.csv), [records]({base}.jsonl)"))
        body = "\n\n".join(parts) or NOTHING
        return f"{match[1]}{body}\n{match[4]}"

    return MARKED.sub(block, text)


def rewrite(page: Path, reports: list[Report]) -> bool:
    """Writes a page anew; False where it has no markers."""
    text = page.read_text()
    page.write_text(rewritten(page, text, reports))
    return MARKED.search(text) is not None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="records.jsonl of the calls, or folders that hold one")
    parser.add_argument("--output", type=Path, help="folder for everything; README and pages stay as they are")
    arguments = parser.parse_args(argv)
    files = [path / "records.jsonl" if path.is_dir() else path for path in arguments.records]
    if files:
        report = Report([record for file in files for record in read(file)])
        if report.dry and arguments.output is None:
            parser.error("these are records of a dry run: give --output, they are nobody's results")
        if not report.dry and "device" not in report.about:
            parser.error("the records name no device: nothing was measured on one")
        written = write(report, arguments.output or RESULTS)
        if arguments.output is not None:
            page = arguments.output / "report.md"
            page.write_text(report.block() + "\n")
            written.append(page)
        print(*written, sep="\n")
    if arguments.output is None:
        reports = [Report(read(file)) for file in sorted(RESULTS.glob("gpu_*.jsonl"))]
        print(*(page for page in PAGES if rewrite(page, reports)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
