"""Every operator and the whole Adam step against PyTorch and against what the machine can do at best.

    python benchmarks/operators.py                          # this machine's GPU, or its CPU
    python benchmarks/operators.py --device cuda --time-budget 560 --resume      # repeat until it says "complete"
    python benchmarks/operators.py --only relaxed_embedding --rows 1 64 --vocab 152064 --dims 1024 --dtypes bfloat16
    python benchmarks/operators.py --readme                 # the README's tables from the committed results

Writes ``results/operators_cpu.{csv,json,png}`` or ``operators_<gpu>.*``, the CSV after every case: a run may be
interrupted at any time and resumed. Columns: the case; implementation; median milliseconds of one call; noise (the same
thing measured twice, relative); how it was timed; ``copy_ms``, a copy of as many bytes as the operator must move, and
``gemm_ms``, its plain matrix products, both measured in the same run, and ``floor_ms`` made of them (``bound`` says
which); measured / floor; peak memory above the inputs, optimiser state included; relative error to fp64; how many
times faster this package is than each baseline; on a GPU the targets and whether they are met.

The whole Adam step (``adam_iteration``) is statistics and top-p draw, relaxed embedding, and the Adam update from a
given gradient of the reward model. Baselines: ``operator_bench/baselines.py``; method: ``operator_bench/timing.py``.
Before anything is timed every implementation is compared with fp64 (``operator_bench/correctness.py``).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from operator_bench import report
from operator_bench.cases import OPERATORS, QUICK, SELECTIONS, Case, cases_of
from operator_bench.correctness import WrongResult
from operator_bench.measure import Settings, measure_case
from operator_bench.results import Results, Row, beside, path_for
from operator_bench.targets import judge
from operator_bench.timing import Limits
from provenance import provenance
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from entrgi.doctor import driver_version

console = Console()


def machine(device: torch.device, threads: int, commit: str | None) -> Row:
    """The columns that every row of a run carries."""
    about: Row = {"kind": device.type, "driver": None, **provenance(threads)}
    about["forced"] = os.environ.get("ENTRGI_FORCE_PLAN") or None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        about["device"] = f"{torch.cuda.get_device_name(device)} (sm {capability})"
        about["driver"] = driver_version() or f"CUDA {torch.ops.entrgi.cuda_versions()[0] / 1000:g}"
    return {**about, "commit": commit or about["commit"]}


def run(cases: list[Case], results: Results, settings: Settings, budget: float | None) -> bool:
    """Measure the cases; False where the budget or the user ended it earlier."""
    console.print(f"{len(cases)} cases to measure", highlight=False)
    start, longest, table = time.monotonic(), 0.0, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            if budget is not None and time.monotonic() - start + 1.2 * longest > budget:
                return False
            if settings.compile != "none" and table != (case.V, case.d, case.logits):
                table = (case.V, case.d, case.logits)
                torch._dynamo.reset()  # what was compiled for other shapes is of no more use
            progress.update(task, description=str(case))
            began = time.monotonic()
            try:
                rows = measure_case(case, settings)
            except KeyboardInterrupt:
                return False
            longest = max(longest, time.monotonic() - began)
            results.add(case, rows)
            judge(results.rows)
            progress.console.print(line(case, results.cases[case.key]), highlight=False, soft_wrap=True)
            progress.advance(task)
    return True


def line(case: Case, rows: list[Row]) -> str:
    """A case in one line: ours, its floor, the others, and whether the targets are met so far."""
    ours, others = rows[0], rows[1:]
    if not ours.get("median_ms"):
        return f"{case}: {ours['status']}"
    text = f"{case}: {ours['median_ms']} ms, {ours['over_floor']}x its floor, noise {ours['noise']:.0%}"
    for row in others:
        if row.get("median_ms"):
            text += f"; {row['implementation']} {row['median_ms'] / beside(ours, row['timing']):.2f}x"
        else:
            text += f"; {row['implementation']}: {row['status']}"
    return f"{text}; targets {ours['met']}" if ours.get("met") else text


def still(done: int, total: int, seconds: float) -> str:
    """What is left, and how long that may take."""
    text = f"{total - done} of {total} cases left"
    return f"{text}, about {math.ceil((total - done) * seconds / done / 60)} min" if done else text


def finish(results: Results, complete: bool) -> None:
    """Targets, files, plot, a summary; at the end of all the targets that were missed."""
    judge(results.rows)
    results.save()
    report.plot(results.rows, results.path.with_suffix(".png"))
    for row in results.rows:
        if complete and "MISSED" in str(row["met"]):
            shape = f"N={row['N']} V={row['V']} d={row['d']} {row['logits']}"
            console.print(f"{row['operator']} {shape}: {row['target']}: {row['met']}", highlight=False)
    console.print(report.summary(results.rows) or "no targets on this device", highlight=False)
    console.print(f"written to {results.path}.{{csv,json,png}}", highlight=False)


def select(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    given = {
        "rows": arguments.rows,
        "vocabularies": arguments.vocab,
        "widths": arguments.dims,
        "dtypes": arguments.dtypes,
        "logits_dtypes": arguments.logits_dtypes,
    }
    given = {name: tuple(values) for name, values in given.items() if values}
    chosen = [replace(each, **given) for each in (QUICK if arguments.quick else SELECTIONS)[device.type]]
    return [case for case in cases_of(chosen) if not arguments.only or case.operator in arguments.only]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.readme:
        for kept in report.rewrite():
            console.print(f"kept what the README says of it, for there is no {kept}.csv", highlight=False)
        return 0
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    limits = Limits(arguments.seconds or (0.25 if device.type == "cuda" else 0.2), most=arguments.repeats or 40)
    limits = replace(limits, least=min(5 if device.type == "cuda" else 3, limits.most))
    compile = arguments.compile or ("none" if arguments.quick else "all" if device.type == "cuda" else "step")
    settings = Settings(device, limits, compile, arguments.compile_seconds)
    if compile != "none":
        torch._dynamo.config.recompile_limit = 256
        torch._functorch.config.donated_buffer = False  # one forward pass, many backward passes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    results = Results(arguments.output or path_for(name), machine(device, arguments.threads, arguments.commit))
    cases = select(arguments, device)
    left = [case for case in cases if not (arguments.resume and results.has(case))]
    began = time.monotonic()
    try:
        complete = run(left, results, settings, arguments.time_budget)
    except WrongResult as wrong:
        console.print(f"[red]wrong result, not timed:[/red] {wrong}", highlight=False)
        return 2
    if results.rows:
        finish(results, complete)
    if not complete:
        done = results.added
        console.print(f"stopped early, {still(done, len(left), time.monotonic() - began)}: go on with --resume")
        return 3
    console.print("complete")
    return 0


def _positive(kind: type, text: str):
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 2**40:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def count(text: str) -> int:
    return _positive(int, text)


def duration(text: str) -> float:
    return _positive(float, text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    dtypes = ["bfloat16", "float16", "float32"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--only", nargs="+", choices=list(OPERATORS), metavar="OPERATOR", help=", ".join(OPERATORS))
    parser.add_argument("--rows", nargs="+", type=count, metavar="N")
    parser.add_argument("--vocab", nargs="+", type=count, metavar="V")
    parser.add_argument("--dims", nargs="+", type=count, metavar="d")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="of the embedding, and of the logits")
    parser.add_argument("--logits-dtypes", nargs="+", choices=dtypes, help="where the logits' are others")
    parser.add_argument("--quick", action="store_true", help="few shapes of the full run, no torch.compile")
    parser.add_argument(
        "--compile", choices=["all", "step", "none"], help="torch.compile baselines; default: all, CPU: step"
    )
    parser.add_argument("--compile-seconds", type=duration, default=120.0, help="give up on a baseline after that")
    parser.add_argument("--seconds", type=duration, help="of measuring for an implementation (0.2; CUDA 0.25)")
    parser.add_argument("--repeats", type=count, help="at most so many calls of an implementation (40)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="skip what was measured here at this clean commit")
    parser.add_argument("--time-budget", type=duration, metavar="SECONDS", help="stop between cases before that")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--output", type=Path, help="path without suffix")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's tables and do nothing else")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("ENTRGI_FORCE_PLAN") and not (arguments.output or arguments.readme):
        parser.error("ENTRGI_FORCE_PLAN is set: give --output, these are not the results of the package's own plans")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
