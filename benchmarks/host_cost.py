"""What a call of each operator costs the host, where there is nothing to compute: N = 1, V = 64, d = 8, on the CPU.

    git worktree add ../before 31745f4 && cd ../before && make build && cd -     # what is compared with, built
    python benchmarks/host_cost.py --before ../before
    python benchmarks/host_cost.py                                               # of this checkout alone

Each library is loaded by a process of its own. In every round each operator is called some thousand times by one
process, then by the other; the least mean of a call over all rounds is kept, since interference only adds. CPU time of
the only thread; fp32, no gradients recorded.

Writes ``results/host_cost.csv``: operator; microseconds of ``torch.ops.entrgi.<operator>`` before and after; of the
function of :mod:`entrgi_ext` after, with its own work; of an empty torch operator (``aten.alias``) in the same process;
and ``after_us`` in such operators.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
EMPTY = "empty"
N, V, D = 1, 64, 8


def calls() -> dict[str, Callable[[], object]]:
    """Operators, functions (``function <name>``) and the empty operator, by name; entrgi_ext is found on sys.path."""
    from entrgi_ext import ops

    raw = torch.ops.entrgi
    z, e, g = torch.randn(N, V), torch.randn(V, D), torch.randn(N, D)
    lse, soft, out = z.logsumexp(1), torch.zeros(N, D), torch.zeros(N, D)
    m, v = torch.zeros(N, V), torch.zeros(N, V)
    keys, rows = torch.zeros(N, 4, dtype=torch.long), torch.arange(N)
    token, weight, written = torch.zeros(N, dtype=torch.long), torch.ones(N), torch.zeros(N, dtype=torch.bool)
    tokens, splits, counts = torch.zeros(1, 4, dtype=torch.long), torch.tensor([0, N]), torch.tensor([1])
    update = (z, g, lse, e, soft, rows, 0.7)
    adam = (0.0, 0.9, 0.999, 1e-8, 2, False)
    name = "row_index" if "row_index" in inspect.signature(ops.logit_gradient).parameters else "rows"  # formerly
    product = {name: rows, "temperature": 0.7}
    return {
        EMPTY: lambda: torch.ops.aten.alias(z),
        "logit_statistics": lambda: raw.logit_statistics(z, 0.7),
        "sample_tokens": lambda: raw.sample_tokens(z, keys, 0.7, 0.95, None, None, None),
        "gumbel_perturb": lambda: raw.gumbel_perturb(z, keys, 0.7),
        "relaxed_embedding": lambda: raw.relaxed_embedding(z, lse, e, token, weight, 0.7),
        "relaxed_embedding_": lambda: raw.relaxed_embedding_(out, soft, z, lse, e, token, weight, rows, 0.7),
        "logit_gradient": lambda: raw.logit_gradient(g, z, lse, e, soft, rows, 0.7),
        "adam_step_": lambda: raw.adam_step_(z, m, v, *update[1:], *adam),
        "sgd_step_": lambda: raw.sgd_step_(*update, 0.0),
        "commit_": lambda: raw.commit_(tokens, written, token, weight, token, splits, counts, None, None, 0.0),
        "function logit_statistics": lambda: ops.logit_statistics(z, 0.7),
        "function sample_tokens": lambda: ops.sample_tokens(z, keys, 0.7, 0.95),
        "function gumbel_perturb": lambda: ops.gumbel_perturb(z, keys, 0.7),
        "function relaxed_embedding": lambda: ops.relaxed_embedding(
            z, e, 0.7, hard_tokens=token, weight=weight, logsumexp=lse
        ),
        "function relaxed_embedding_": lambda: ops.relaxed_embedding_(
            out, soft, z, lse, e, hard_tokens=token, weight=weight, **product
        ),
        "function logit_gradient": lambda: ops.logit_gradient(g, z, lse, e, soft, **product),
        "function adam_step_": lambda: ops.adam_step_(z, m, v, g, lse, e, soft, lr=0.0, step=2, **product),
        "function sgd_step_": lambda: ops.sgd_step_(z, g, lse, e, soft, lr=0.0, **product),
        "function commit_": lambda: ops.commit_(tokens, written, token, weight, token, splits, counts),
    }


def serve(folder: Path) -> None:
    """Answer lines [name, calls] with microseconds per call, for the library of ``folder``."""
    sys.path.insert(0, str(folder))
    import entrgi_ext

    if not Path(entrgi_ext.__file__).is_relative_to(folder):
        raise SystemExit(f"--before: {folder} holds no entrgi_ext, found {entrgi_ext.__file__}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = calls()
    print(json.dumps(list(table)), flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            name, count = json.loads(line)
            call = table[name]
            call()
            start = time.thread_time()
            for _ in range(count):
                call()
            print(json.dumps((time.thread_time() - start) / count * 1e6), flush=True)


class Process:
    """A process that has the library of a folder loaded."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, "--serve", str(folder.resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names: list[str] = self.read()

    def read(self) -> object:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a measuring process ended before its time")
        return json.loads(line)

    def measure(self, name: str, count: int) -> float:
        self.process.stdin.write(json.dumps([name, count]) + "\n")
        self.process.stdin.flush()
        return self.read()


def compare(before: Path | None, rounds: int, count: int) -> list[dict[str, object]]:
    """The rows of the table."""
    sides = {"after": Process(ROOT)} if before is None else {"before": Process(before), "after": Process(ROOT)}
    least: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name in sides["after"].names:
            for side, process in sides.items():
                key = side, name
                least[key] = min(process.measure(name, count), least.get(key, float("inf")))
    for process in sides.values():
        process.process.stdin.close()
        process.process.wait()

    def rounded(side: str, name: str) -> float | None:
        return round(least[side, name], 2) if (side, name) in least else None

    operators = [name for name in sides["after"].names if name != EMPTY and not name.startswith("function ")]
    return [
        {
            "operator": name,
            "before_us": rounded("before", name),
            "after_us": rounded("after", name),
            "function_before_us": rounded("before", f"function {name}"),
            "function_after_us": rounded("after", f"function {name}"),
            "empty_us": rounded("after", EMPTY),
            "ratio": round(least["after", name] / least["after", EMPTY], 2),
        }
        for name in operators
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit with its library built")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=2000, help="of an operator in one round")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/host_cost.csv")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    from provenance import provenance

    about = provenance(threads=1)
    rows = [{**row, **about} for row in compare(options.before, options.rounds, options.calls)]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(row[name] for name in list(row)[:7]), sep="\t")


if __name__ == "__main__":
    main()
