"""Has an operator become slower? A short measurement against the committed one, as ratios.

    python benchmarks/bench_check.py            # make bench-check; exit status 1 on a regression

Measures ``operators.py --quick`` into a temporary file and compares every operator of this package with what was
measured beside it: time / baseline for each baseline, and time / floor. Such ratios belong to the code more than to the
machine: one that is twice as fast in everything has the same. An operator has regressed where the median of its ratios
has grown by more than the tolerance: three times the noise of ours and of the median baseline in both measurements, at
least a tenth and at most 30 %. (The median, so that one baseline that became faster with a new version of torch is no
regression of ours.) Where the noise asks for more than that, the operator is "too noisy" to say.

Exit status: 0 nothing has regressed; 1 something has; 2 nothing can be said, for want of committed results or of quiet.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import operators
import torch
from operator_bench.results import Row, beside, case_key, path_for, read
from rich.console import Console
from rich.table import Table

LEAST_TOLERANCE, MOST_TOLERANCE, NOISES = 0.10, 0.30, 3.0
FLOOR = "floor"


@dataclass(frozen=True)
class Comparison:
    """One operator at one shape.

    Attributes:
        growth: of the ratio to each reference, by its name: 1.2 is slower by a fifth.
        noise: of such a ratio.
    """

    case: tuple
    growth: dict[str, float]
    noise: float

    @property
    def tolerance(self) -> float:
        return min(max(LEAST_TOLERANCE, NOISES * self.noise), MOST_TOLERANCE)

    @property
    def too_noisy(self) -> bool:
        return NOISES * self.noise > MOST_TOLERANCE

    @property
    def change(self) -> float:
        return statistics.median(self.growth.values()) - 1.0

    @property
    def regressed(self) -> bool:
        return self.change > self.tolerance


def compare(committed: list[Row], fresh: list[Row]) -> list[Comparison]:
    """Every case that both have."""
    before, now = _by_case(committed), _by_case(fresh)
    comparisons = []
    for case, rows in now.items():
        old = before.get(case, {})
        if "entrgi" not in old or "entrgi" not in rows:
            continue
        shared = [name for name in rows if name in old and name != "entrgi"]
        growth = {name: _ratio(rows, name) / _ratio(old, name) for name in [FLOOR, *shared]}
        # The noise of a ratio is that of its two times.
        ours = [float(group["entrgi"]["noise"] or 0.0) for group in (old, rows)]
        theirs = [
            statistics.median([float(group[name]["noise"] or 0.0) for name in shared] or [0.0]) for group in (old, rows)
        ]
        comparisons.append(Comparison(case, growth, math.hypot(*ours, *theirs)))
    return comparisons


def _by_case(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["median_ms"] is not None:
            cases.setdefault(case_key(row), {})[str(row["implementation"])] = row
    return cases


def _ratio(rows: dict[str, Row], reference: str) -> float:
    ours = rows["entrgi"]
    if reference == FLOOR:
        return float(ours["median_ms"]) / float(ours["floor_ms"])
    return beside(ours, rows[reference].get("timing")) / float(rows[reference]["median_ms"])


def show(comparisons: list[Comparison], console: Console) -> None:
    names = list(dict.fromkeys(name for each in comparisons for name in each.growth))
    table = Table("operator", "N, V, d", "dtypes", *[f"/ {name}" for name in names], "change", "tolerance", "")
    for each in comparisons:
        operator, n, v, d, logits, embedding = each.case
        verdict = "REGRESSED" if each.regressed else "too noisy" if each.too_noisy else "ok"
        table.add_row(
            *(operator, f"{n}, {v}, {d}", f"{logits} / {embedding}"),
            *(f"{each.growth[name] - 1:+.0%}" if name in each.growth else "" for name in names),
            *(f"{each.change:+.0%}", f"{each.tolerance:.0%}", verdict),
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--committed", type=Path, help="path without suffix")
    arguments, rest = parser.parse_known_args(argv)
    if os.environ.get("ENTRGI_FORCE_PLAN"):
        parser.error("ENTRGI_FORCE_PLAN is set: the committed results are those of the package's own plans")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    committed = read(arguments.committed or path_for(name))
    console = Console(width=max(Console().width, 140))  # whole lines in a log, too
    if not committed:
        console.print("nothing to compare with: no committed results for this device", highlight=False)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "operators"
        status = operators.main(["--quick", "--device", arguments.device, "--output", str(output), *rest])
        fresh = read(output)
    if status != 0:
        return status
    for column in ("device", "threads", "torch"):
        if committed[0][column] != fresh[0][column]:
            console.print(f"another {column}: {committed[0][column]} then, {fresh[0][column]} now", highlight=False)
    comparisons = compare(committed, fresh)
    show(comparisons, console)
    regressed = [each for each in comparisons if each.regressed]
    noisy = [each for each in comparisons if each.too_noisy and not each.regressed]
    console.print(f"of {len(comparisons)} {len(regressed)} regressed, {len(noisy)} too noisy to say", highlight=False)
    return 1 if regressed else 2 if noisy or not comparisons else 0


if __name__ == "__main__":
    sys.exit(main())
