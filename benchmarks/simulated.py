"""What our CUDA kernels ask of the memory system and of the arithmetic units, counted in the CUDA simulator.

    python benchmarks/simulated.py                  # results/simulated.{csv,md}, a few minutes; make bench-simulated

No GPU is needed and nothing is timed: the compiled kernels run on small shapes, for both builds (``compute_80`` and
``compute_90a``), and every launch is counted. The sums over an operator's launches are held against three things:

- *the plan*: the bytes and FLOPs that ``_bindings.requests`` says its kernels issue, within 2 %;
- *once*: z is read once by the statistics and, on Hopper, by the draw, E once per tile of rows by the two products, z
  and Adam's moments are read and written once by the update;
- *the hardware*: accesses coalesced (95 % of the bytes of the sectors touched are asked for) where rows are aligned,
  and no bank conflicts above two-way. What is tolerated beyond is a list with limits
  (``simulated_traffic/checks.py``), printed with the table.

Beside them stands the floor (``_bindings.floor``): bytes that must cross the memory bus. Issued bytes may exceed it:
what several CTAs read of E or z comes from the L2 cache.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from simulated_traffic.counting import BUILDS, Simulator
from simulated_traffic.shapes import SHAPES
from simulated_traffic.tables import markdown, rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.build_simulated import Unavailable  # noqa: E402

OUTPUT = ROOT / "benchmarks" / "results" / "simulated"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--builds", nargs="+", choices=list(BUILDS), default=list(BUILDS))
    parser.add_argument("--only", help="operators whose name holds this")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="path without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: list[dict] = []
    for build in arguments.builds:
        try:
            simulator = Simulator(build)
        except Unavailable as reason:
            sys.exit(f"CUDA kernels cannot be run here: {reason}")
        counted = []
        for shape in SHAPES:
            if arguments.only is None or arguments.only in shape.operator:
                start = time.monotonic()
                counted.append(simulator.count(shape))
                print(f"{build}: {shape}: {counted[-1].plan['kernel']}, {time.monotonic() - start:.1f} s", flush=True)
        simulator.ask(counted)
        simulator.close()
        for each in counted:
            table += rows(each)
    columns = list(dict.fromkeys(name for row in table for name in row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    arguments.output.with_suffix(".md").write_text(markdown(table))
    wrong = [row for row in table if row.get("complaints")]
    for row in wrong:
        shape = f"{row['operator']} {row['step']} N={row['N']} V={row['V']} d={row['d']}"
        print(f"{row['build']}: {shape}: {row['complaints']}")
    print(f"{len(wrong)} complaints; written to {arguments.output}.{{csv,md}}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
