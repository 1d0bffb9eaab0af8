"""Options of ``tools/gpu_day.py``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import build, machine, pack, phases, records, shapes
from .day import Day
from .table import table

STARTED = time.monotonic()  # the clock of the machine runs since then
ROOT = build.ROOT
PACK, SCRATCH = ROOT / "build" / "gpu_pack", ROOT / "build" / "gpu_day"
PLANTED = {"relaxed_embedding": "hang", "adam_step_middle": "wrong"}  # of a dry run: in the first case of an operator


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.command == "pack":
        return _pack(arguments.output)
    if arguments.list:
        for phase in phases.PHASES:
            print(f"{phase.name:12s} {phase.seconds:4.0f} s  {phase.about}")
        return 0
    return dry_run(arguments) if arguments.dry_run else real_run(arguments)


def _pack(folder: Path) -> int:
    try:
        notes = pack.pack(folder)
    except pack.Unusable as reason:
        print(f"not packed: {reason}", file=sys.stderr)
        return 1
    print(f"packed {folder}", *notes, sep="\n  ")
    return 0


def real_run(arguments: argparse.Namespace) -> int:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    box = machine.gpu(SCRATCH)
    build.install_wheels(arguments.pack, SCRATCH / "site")
    cutlass = None
    if (arguments.pack / "cutlass.tar.xz").exists():
        cutlass = SCRATCH / "cutlass"
        build.unpack(arguments.pack / "cutlass.tar.xz", cutlass)
    target, jobs = ROOT / "entrgi_ext", max((os.cpu_count() or 2) - 1, 1)
    command = build.cmake_command(SCRATCH, target, cutlass, jobs, arguments.bounded_waits)
    return _run(
        arguments, box, shapes.real(), lambda: build.Build(arguments.pack, SCRATCH, target, box.environment(), command)
    )


def dry_run(arguments: argparse.Namespace) -> int:
    """A build that fails, libraries brought along, one case that hangs and one that is wrong; all else is in order."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _stand_ins(scratch / "bin")
        box, why = machine.dry(scratch, dict(PLANTED), arguments.stub)
        if why:
            print(f"no simulator ({why}): the parent alone is tried out, with answers that are made up")
        carried = arguments.pack if arguments.pack != PACK else _small_pack(scratch, box)
        target, environment = scratch / "libraries", box.environment()
        command = build.cmake_command(scratch, target, scratch / "no headers here", 1)
        if box.kind == machine.STUB:
            command = [sys.executable, "-c", "raise SystemExit('there is no compiler')"]
            environment["PYTHONPATH"] = str(_stub_package(scratch))
        status = _run(
            arguments,
            box,
            shapes.small(),
            lambda: build.Build(carried, scratch, target, environment, command, cuda=False),
        )
    unplanned = surprises(records.read(arguments.output / "records.jsonl"))
    for line in unplanned:
        print(f"not as planted: {line}", file=sys.stderr)
    return 1 if unplanned else status


def surprises(lines: list[dict]) -> list[str]:
    """What a dry run shows beyond what was planted in it, and what was planted and is not shown."""
    found, seen = [], []
    for each in records.outcomes(lines):
        status, why, operator = each["status"], str(each.get("why", "")), each["case"].split(":")[0]
        if status == records.RIGHT:
            continue
        if status == records.SKIPPED and (why.endswith("not here") or why.startswith(("hang in", "wrong in"))):
            continue
        if each["phase"] == "build" and status == records.FAILED and each.get("source") == build.CARRIED:
            continue
        if each["phase"] == "smoke" and PLANTED.get(operator) == status and status not in seen:
            seen.append(status)
            continue
        found.append(f"{each['phase']}: {each['case']}: {status}: {why}")
    if any(each["event"] == "phase" and each["phase"] == "smoke" for each in lines):
        found += [f"no case of smoke is {what}" for what in PLANTED.values() if what not in seen]
    found += [f"{each['event']}: {each}" for each in lines if each["event"] in ("stop", "cut", "dead", "error")]
    return found


def _small_pack(scratch: Path, box: machine.Machine) -> Path:
    """A folder as ``pack`` makes it, around what the dry run launches."""
    folder = scratch / "pack"
    (folder / "wheels").mkdir(parents=True)
    library = box.bindings if box.bindings.is_file() else Path(__file__)
    pack.archive(folder / "libraries.tar.xz", [library], preset=0)
    (folder / "manifest.json").write_text(json.dumps({"sources": build.source_hash(), "commit": "none"}))
    return folder


STAND_INS = {
    "compute-sanitizer": 'shift 6; exec "$@"',
    "ncu": """while [ "$1" != "{python}" ]; do shift; done; "$@" || exit 1
cat <<END
"ID","Process ID","Kernel Name","gpu__time_duration.sum"
"","","","us"
"0","1","a stand-in","1"
END""",
}


def _stand_ins(folder: Path) -> None:
    """Programs that run what they are given and find nothing, where a GPU's tools would be."""
    folder.mkdir()
    for name, body in STAND_INS.items():
        script = folder / name
        body = body.replace("{python}", sys.executable)
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo a stand-in && exit\n{body}\n')
        script.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def _stub_package(scratch: Path) -> Path:
    """Where a package is that imports as the real one does."""
    package = scratch / "stub" / "entrgi_ext"
    package.mkdir(parents=True)
    (package / "_bindings.py").write_text("has_cuda = False\n")
    (package / "__init__.py").write_text("def loaded_libraries():\n    return {}\n")
    return package.parent


def _run(
    arguments: argparse.Namespace, box: machine.Machine, wanted: shapes.Shapes, start_build: Callable[[], build.Build]
) -> int:
    # A dry run may have built the simulator first: that is no part of its time.
    out = records.Records(arguments.output, None if box.dry else STARTED)
    everything = tuple(phase.name for phase in phases.PHASES) if box.dry else ()
    chosen = phases.chosen(arguments.deadline, tuple(arguments.only or everything))
    clock = phases.Clock(arguments.deadline, chosen, out.start)
    out.write(
        "run",
        commit=_commit(arguments),
        on=box.kind if box.dry else "GPU",
        dry=box.dry,
        deadline=arguments.deadline,
        phases=[phase.name for phase in chosen],
        left_out=[phase.name for phase in phases.PHASES if phase not in chosen],
    )

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(arguments.deadline - phases.REPORT_SECONDS / 2 - out.clock, 1.0))
    day = Day(box, wanted, clock, out, start_build)
    day.run()
    signal.setitimer(signal.ITIMER_REAL, 0)
    out.write("done")
    text = table(records.read(out.path))
    (arguments.output / "table.txt").write_text(text + "\n")
    print(text)
    return 0


def _commit(arguments: argparse.Namespace) -> str:
    if arguments.commit:
        return arguments.commit
    if shutil.which("git"):
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.strip()
    manifest = arguments.pack / "manifest.json"
    return json.loads(manifest.read_text())["commit"] if manifest.exists() else "none"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    from gpu_day import __doc__ as about

    parser = argparse.ArgumentParser(prog="gpu_day.py", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the folder that is carried")
    packing.add_argument("--output", type=Path, default=PACK)
    run = commands.add_parser("run", help="build, check, measure")
    run.add_argument(
        "--deadline", type=float, default=590.0, metavar="SECONDS", help="when the table must be printed (590)"
    )
    names = [phase.name for phase in phases.PHASES]
    run.add_argument("--only", nargs="+", choices=names, metavar="PHASE", help="these phases; --list names them")
    run.add_argument("--list", action="store_true", help="name the phases and do nothing else")
    run.add_argument("--output", type=Path, help="folder of the results; default: $OUT, else build/gpu_day/out")
    run.add_argument("--pack", type=Path, default=PACK, help="folder that was carried")
    run.add_argument(
        "--bounded-waits",
        action="store_true",
        help="build kernels whose waits trap after some seconds: a hang has a place",
    )
    run.add_argument("--commit", help="where git is not at hand")
    run.add_argument(
        "--dry-run", action="store_true", help="with the simulator and small shapes; three things go wrong"
    )
    run.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)  # of the dry run: no simulator
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        if not 20 <= arguments.deadline <= 3600:
            parser.error(f"--deadline must be 20 to 3600 seconds, got {arguments.deadline:g}")
        default = Path(os.environ["OUT"]) if os.environ.get("OUT") else SCRATCH / "out"
        arguments.output = arguments.output or default
    return arguments
