"""Everything that a GPU has to show, in one call of at most ten minutes, on a machine that may have no network.

    python3 tools/gpu_day.py pack                      here, before: what the machine lacks, into build/gpu_pack
    python3 tools/gpu_day.py run --deadline 590        there: build, check, measure; results in $OUT or --output
    python3 tools/gpu_day.py run --only end-to-end --deadline 235
    python3 tools/gpu_day.py run --list                the phases, for --only
    python3 tools/gpu_day.py run --dry-run             anywhere: the same with the simulator and small shapes

What may go wrong costs its own case: a hang, a wrong result, a build that fails. Every record is one JSON line in
``records.jsonl``, on disk before and after whatever it is about; ``benchmarks/gpu_report.py`` makes tables of them.
"""

import sys

from gpu_day.command import main

if __name__ == "__main__":
    sys.exit(main())
