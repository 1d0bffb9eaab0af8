"""The day itself: goes through the timetable; whatever goes wrong costs its own case."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from . import build, machine, tools
from .child import Child, Ended, Expired, end_group
from .phases import Clock, Phase
from .records import FAILED, HANG, RIGHT, SKIPPED, STOPPED, WRONG, Records
from .shapes import Shapes, title

ALIVE_SECONDS, DEBUGGER_SECONDS, BUILD_SECONDS = 10.0, 30.0, 90.0
AHEAD = 3  # forced plans: processes that import PyTorch while another one measures
TILE = ("kernel", "block_m", "block_n", "cluster_m", "cluster_n")


class DeviceGone(RuntimeError):
    """A fresh process cannot allocate any more: nothing that follows would be true."""


class Day:
    """One run.

    Attributes:
        avoid: fields of plans that are not launched again, each with its reason.
    """

    def __init__(
        self, box: machine.Machine, shapes: Shapes, clock: Clock, out: Records, built: Callable[[], build.Build]
    ):
        self.box, self.shapes, self.clock, self.out, self.start_build = box, shapes, clock, out, built
        self.scratch, self.probe = box.scratch, box.scratch / "probe"
        self.children: dict[str, Child] = {}
        self.avoid: list[dict] = []
        self.debugged: set[str] = set()
        self.arch, self.libraries, self.end = 90, build.NONE, 0.0
        self.phase: Phase = clock.phases[0]
        self.building: build.Build | None = None

    def run(self) -> None:
        try:
            for phase in self.clock.phases:
                self.phase = phase
                self._enter()
        except DeviceGone as gone:
            self.out.write("stop", phase=self.phase.name, why=str(gone))
        except KeyboardInterrupt:
            self.out.write("stop", phase=self.phase.name, why="interrupted, or the time is up")
        finally:
            self.close()

    def close(self) -> None:
        for name in list(self.children):
            self._drop(name)
        if self.building is not None and self.building.process is not None:
            end_group(self.building.process)

    def _enter(self) -> None:
        phase, self.end = self.phase, self.clock.limit(self.phase)
        limit = round(self.end - time.monotonic(), 1)
        self.out.write("phase", phase=phase.name, about=phase.about, limit_s=limit)
        if phase.needs == "libraries" and self.libraries == build.NONE:
            self._end("all", SKIPPED, why="the package's libraries are missing")
        elif limit < 2:
            self._end("all", SKIPPED, why="no time is left")
        else:
            getattr(self, phase.name.replace("-", "_"))()

    # ---- one case -------------------------------------------------------------------------------------------

    def case(self, name: str, child: str, request: dict, **options: object) -> dict:
        """Asks a child; whatever happens is written, and the child is there again for the next case."""
        self.out.write("begin", phase=self.phase.name, case=name)
        began, seconds = time.monotonic(), min(self.box.seconds[self.phase.name], max(self.clock.left, 0.1))
        process = self._child(child, **options)
        try:
            answer = process.ask(request, seconds)
        except Expired as expired:
            answer = self._expired(child, process, seconds, str(expired))
        except Ended as ended:
            self._drop(child)
            answer = {"status": FAILED, "why": str(ended)}
        if answer["status"] == WRONG:
            self.avoid += [{**plan, "why": f"wrong in {self.phase.name}: {name}"} for plan in process.plans]
        if answer["status"] == FAILED and "CUDA" in answer.get("why", ""):  # the error stays with the process
            self._drop(child)
            self._require_device()
        self._end(name, began=began, **answer)
        return answer

    def _end(self, case: str, status: str, began: float | None = None, **fields: object) -> None:
        if began is not None:
            fields["seconds"] = round(time.monotonic() - began, 2)
        self.out.write("end", phase=self.phase.name, case=case, status=status, **fields)

    @property
    def time_is_left(self) -> bool:
        return time.monotonic() < self.end

    def _cases(self, cases: list, run: Callable[[object], None]) -> None:
        """All of them until the phase's time is over; what was not reached is counted."""
        for place, each in enumerate(cases):
            if not self.time_is_left:
                self.out.write("cut", phase=self.phase.name, left=len(cases) - place, of=len(cases))
                return
            run(each)

    def _expired(self, name: str, process: Child, seconds: float, why: str) -> dict:
        """A hang: what the device does, an end to the process, a look at the device."""
        plans, kernels = process.plans, [plan["kernel"] for plan in process.plans]
        if not process.ready:
            self._drop(name)
            return {"status": FAILED, "why": why}
        if self.clock.left < 1:
            self._drop(name)
            return {"status": STOPPED, "why": "the time is up"}
        key = " ".join(kernels)
        if not self.box.dry and key not in self.debugged and self.clock.left > 2 * DEBUGGER_SECONDS:
            self.debugged.add(key)
            (self.scratch / "debugger.log").write_text(process.where())
            self.out.keep(self.scratch / "debugger.log", "hangs.log", f"{key or name}: cuda-gdb")
        self._drop(name, at_once=True)
        for plan in plans:
            fields = {field: plan[field] for field in TILE if field in plan}
            if any(entry["kernel"] == plan["kernel"] and entry["why"].startswith(HANG) for entry in self.avoid):
                fields = {"kernel": plan["kernel"]}  # the second time: whatever its tile
            self.avoid.append({**fields, "why": f"{HANG} in {self.phase.name}"})
        self._require_device()
        return {"status": HANG, "why": f"no answer within {seconds:.0f} s", "kernels": kernels}

    def _require_device(self) -> None:
        """A fresh process allocates and writes.

        Raises:
            DeviceGone: it does not within ten seconds.
        """
        command = self.box.probe(self.probe, "alive")
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=ALIVE_SECONDS + 20 * (command[-1] != "alive")
            )
            alive = run.returncode == 0 and '"alive"' in run.stdout
            why = run.stdout.strip() or run.stderr.strip()[-300:]
        except subprocess.TimeoutExpired:
            alive, why = False, "no answer"
        self.out.write("alive" if alive else "dead", phase=self.phase.name, why=why)
        if not alive:
            raise DeviceGone(f"a fresh process cannot use the device: {why}")

    # ---- children -------------------------------------------------------------------------------------------

    def _child(self, name: str, prefix: str = "", **environment: str) -> Child:
        """``script`` or ``script/something``: a process that is kept until it fails."""
        if name not in self.children:
            script, arguments = self.box.script(name.split("/")[0])
            log = self.scratch / f"{name.replace('/', '-').replace(' ', '_')[:80]}.log"
            self.children[name] = Child(script, arguments, self.box.environment(self.arch, prefix, **environment), log)
        return self.children[name]

    def _drop(self, name: str, at_once: bool = False) -> None:
        child = self.children.pop(name)
        if at_once:
            end_group(child.process)
        else:
            child.close()
        self.out.keep(child.log, "children.log", name)
        child.log.unlink(missing_ok=True)

    # ---- phases ---------------------------------------------------------------------------------------------

    def facts(self) -> None:
        self.building = self.start_build()
        for name, command in tools.FACTS.items():
            if (program := machine.find(command[0])) is None:
                self._end(name, SKIPPED, why=f"{command[0]} is not here")
                continue
            run = tools.run([program, *command[1:]], 10)
            self._end(name, RIGHT if run.status == 0 else FAILED, text=run.text.strip()[-600:])
        self._end("python", RIGHT, text=f"{sys.version.split()[0]}, {os.cpu_count()} processors")

    def ceilings(self) -> None:
        """The probe is compiled while PyTorch is imported."""
        self._child("ceilings")
        command = self.box.probe_command(Path(__file__).with_name("probe.cu"), self.probe)
        compiled = tools.run(command, 20) if command else None
        about = self.case("device", "ceilings", {"do": "device"})
        if about["status"] == RIGHT and "capability" in about:
            self.arch = 90 if about["capability"].startswith("9.") else 80
            self.out.write("device", **{key: value for key, value in about.items() if key != "status"})
        requests = [("copy", {"do": "copy", "bytes": self.shapes.copy_bytes})]
        requests += [("read", {"do": "read", "bytes": self.shapes.copy_bytes})]
        for m, k, n, transposed in self.shapes.products:
            name = f"product {m} x {k} x {n}{' transposed' if transposed else ''}"
            requests.append((name, {"do": "product", "m": m, "k": k, "n": n, "transposed": transposed}))
        self._cases(requests, lambda pair: self.case(pair[0], "ceilings", pair[1]))
        if compiled is not None and compiled.status != 0:
            self._end("clusters", FAILED, why=compiled.text.strip()[-300:])
        elif "clusters" in self.box.probe(self.probe, "clusters") or not command:
            run = tools.run(self.box.probe(self.probe, "clusters"), ALIVE_SECONDS)
            found = json.loads(run.text) if run.status == 0 else {}
            self._end(
                "clusters", RIGHT if found else FAILED, resident=found, why="" if found else run.text.strip()[-300:]
            )
        self._drop("ceilings")

    def build(self) -> None:
        self.libraries = self.building.wait(min(self.end, self.out.start + BUILD_SECONDS))
        status = RIGHT if self.libraries in (build.BUILT, build.FOUND) else FAILED
        self._end("libraries", status, source=self.libraries, why=self.building.why)
        self.out.keep(self.building.log, "build.log", "build")

    def smoke(self) -> None:
        for name in ("smoke/all", "main_kernels"):  # imported while the cases are listed
            self._child(name)
        variants = self._variants()
        for family in dict.fromkeys(variant["family"] for variant in variants):
            self._child(f"smoke/{family}")

        def check(variant: dict) -> None:
            planted = self.box.planted.pop(variant["case"]["operator"], "")
            self.case(variant["name"], f"smoke/{variant['family']}", {**self._check(variant), "planted": planted})

        self._cases(variants, check)

    def _variants(self) -> list[dict]:
        request = {"do": "enumerate", "arch": self.arch, "small": self.shapes.small}
        answer = self.case("list of cases", "smoke/all", request)
        return answer.get("cases", [])

    def _check(self, variant: dict) -> dict:
        return {"do": "check", "variant": variant, "avoid": self.avoid}

    def main(self) -> None:
        def check(pair: tuple[dict, str]) -> None:
            case, embedding = pair
            name = title(case) + (f", {embedding} E" if case["d"] else "")
            request = {"do": "check", "case": case, "embedding": embedding, "avoid": self.avoid}
            self.case(name, "main_kernels", request)

        self._child("bench")
        self._cases(list(self.shapes.main), check)
        if "main_kernels" in self.children:
            self._drop("main_kernels")

    def tests(self) -> None:
        """Test files whose kernels hung are left out."""
        hung = {entry["kernel"] for entry in self.avoid if entry["why"].startswith(HANG)}
        selections = tools.selections(self.box, hung)
        for place, (name, arguments) in enumerate(selections):
            share = (self.end - time.monotonic()) / (len(selections) - place) * (1.4 if place == 0 else 1.0)
            self.out.write("begin", phase=self.phase.name, case=name)
            began, log = time.monotonic(), self.scratch / "tests.log"
            run = tools.run([*self.box_python(), *arguments], share, self.box.environment(self.arch), log)
            results = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", run.text)
            failed = re.findall(r"\b(?:FAILED|ERROR)\b.*?(tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", run.text)
            names = sorted({a or b for a, b in failed})
            status = WRONG if names else RIGHT if run.status == 0 else STOPPED if run.status is None else FAILED
            self._end(name, status, began=began, counts=dict(Counter(results)), failed=names[:60], why=run.why)
            self.out.keep(log, "tests.log", name)
            if run.status is None:
                self._require_device()

    def box_python(self) -> list[str]:
        return [sys.executable] if self.box.kind != machine.STUB else [sys.executable, "-c", tools.STUB_TESTS]

    def bench(self) -> None:
        def measure(item: tuple) -> None:
            name, request = item
            self.case(name, "bench", {**request, "seconds": self.shapes.seconds, "avoid": self.avoid})

        draws = [
            (f"{title(c)} spread {spread:g}{', forbidden ids' if forbidden else ''}",
             {"do": "draw", "case": c, "spread": spread, "forbidden": forbidden})
            for c, spread, forbidden in self.shapes.draws
        ]  # fmt: skip
        operators = [(title(c), {"do": "case", "case": c}) for c in self.shapes.bench]
        half = min(15, len(operators))
        self._cases(operators[:half] + draws + operators[half:], measure)

    def forced(self) -> None:
        """A process for each plan: it is read once. The next ones start while one measures."""
        plans = list(self.shapes.forced)

        def measure(place: int) -> None:
            for ahead in plans[place : place + AHEAD + 1]:
                self._child(f"bench/{ahead.name}", ENTRGI_FORCE_PLAN=ahead.plan)
            each, name = plans[place], f"bench/{plans[place].name}"
            request = {"do": "case", "case": each.case, "only": ["entrgi"], "seconds": self.shapes.seconds}
            answer = self.case(each.name, name, {**request, "avoid": self.avoid}, ENTRGI_FORCE_PLAN=each.plan)
            del answer
            if name in self.children:
                self._drop(name)

        self._cases(list(range(len(plans))), measure)
        for name in [name for name in self.children if name.startswith("bench/")]:
            self._drop(name, at_once=True)

    def step(self) -> None:
        def measure(item: tuple[dict, str, tuple[str, ...]]) -> None:
            case, compile, only = item
            name = title(case) + (f", {' and '.join(only)}" if only else "")
            request = {"do": "case", "case": case, "compile": compile, "only": only}
            self.case(name, "bench", {**request, "seconds": self.shapes.seconds, "avoid": self.avoid})

        self._cases(list(self.shapes.steps), measure)
        if "bench" in self.children:
            self._drop("bench")

    def ncu(self) -> None:
        program = machine.find("ncu")
        if program is None:
            return self._end("counters", SKIPPED, why="ncu is not here")
        self.out.write("begin", phase="ncu", case="counters")
        began, log = time.monotonic(), self.scratch / "ncu.log"
        script = [
            sys.executable,
            str(Path(__file__).parent / "children" / "counters.py"),
            *map(str, self.shapes.counted),
        ]
        launches: list[dict] = []
        for metrics in tools.COUNTERS:  # names of counters change: the second list is one of ncu's own sections
            left = self.end - time.monotonic()
            if launches or left < 5:
                break
            run = tools.run([program, *metrics, *script], left, self.box.environment(self.arch), log)
            launches = tools.counters(run.text)
        self.out.keep(log, "tools.log", "ncu")
        self._end("counters", RIGHT if launches else FAILED, began=began, launches=launches, why=run.why)
        return None

    def sanitize(self) -> None:
        program = machine.find("compute-sanitizer")
        if program is None:
            return self._end("memcheck", SKIPPED, why="compute-sanitizer is not here")
        variants = self._variants()
        for tool, most in (("memcheck", 20), ("synccheck", 4)):
            prefix = f"{program} --tool {tool} --report-api-errors no --error-exitcode 99"
            first = [variant for variant in variants if variant.get("rank", 0) == 0]
            chosen, name = first[:: max(1, len(first) // most)][:most], f"smoke/{tool}"
            self._cases(
                chosen, lambda v, n=name, p=prefix, t=tool: self.case(f"{t}: {v['name']}", n, self._check(v), prefix=p)
            )
            self.case(f"{tool}: findings", name, {"do": "findings"}, prefix=prefix)
        return None

    def end_to_end(self) -> None:
        workload, steps, variants = self.shapes.guided
        built = self.case(f"models of {workload}", "guided", {"do": "build", "workload": workload, "steps": steps})
        if built["status"] != RIGHT:
            return

        def measure(variant: str) -> None:
            if "guided" not in self.children:  # it failed or hung before: the models are gone with it
                self._child("guided").ask({"do": "build", "workload": workload, "steps": steps}, 60)
            self.case(f"{workload}: {variant}", "guided", {"do": "variant", "variant": variant, "repeats": 1})

        self._cases(list(variants), measure)
