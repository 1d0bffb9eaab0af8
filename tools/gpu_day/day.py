"""The day itself: goes through the timetable; whatever goes wrong costs its own case."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import build, machine, tools
from .child import end_group
from .phases import Clock
from .records import FAILED, HANG, RIGHT, SKIPPED, STOPPED, WRONG, Records
from .session import ALIVE_SECONDS, DeviceGone, Session
from .shapes import Forced, Shapes, title

BUILD_SECONDS = 90.0  # from the start
AHEAD = 3  # forced plans: processes that import PyTorch while another one measures
OPERATORS_BEFORE_DRAWS = 15
CHILDREN = Path(__file__).with_name("children")


class Day(Session):
    """One run; a method for each phase of the timetable."""

    def __init__(
        self, box: machine.Machine, shapes: Shapes, clock: Clock, out: Records, built: Callable[[], build.Build]
    ):
        super().__init__(box, clock, out)
        self.shapes, self.start_build, self.libraries = shapes, built, build.NONE
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
            self.drop_all()
            if self.building is not None and self.building.process is not None:
                end_group(self.building.process)

    def _enter(self) -> None:
        self.end = self.clock.limit(self.phase)
        with suppress(BrokenPipeError):
            print(f"{self.out.clock:5.0f} s  {self.phase.name}: {self.phase.about}", flush=True)
        self.out.write("phase", phase=self.phase.name, about=self.phase.about, limit_s=round(self.left, 1))
        if self.phase.needs == "libraries" and self.libraries == build.NONE:
            return self.ended("all", SKIPPED, why="the package's libraries are missing")
        if self.left < 2:
            return self.ended("all", SKIPPED, why="no time is left")
        try:
            getattr(self, self.phase.name.replace("-", "_"))()
        except DeviceGone:
            raise
        except Exception:  # of this script: the next phase may still be of use
            self.out.write("error", phase=self.phase.name, why=traceback.format_exc())
        return None

    # ---- before anything of this package runs ---------------------------------------------------------------

    def facts(self) -> None:
        self.building = self.start_build()

        def ask(name: str) -> None:
            command = tools.FACTS[name]
            if (program := machine.find(command[0])) is None:
                return self.ended(name, SKIPPED, why=f"{command[0]} is not here")
            run = tools.run([program, *command[1:]], 5)
            if name == "gpu" and run.status == 0:
                self.out.write("device", device=run.text.strip().splitlines()[-1].split(",")[0])
            return self.ended(name, RIGHT if run.status == 0 else FAILED, text=run.text.strip()[-600:])

        self.ended("python", RIGHT, text=f"{sys.version.split()[0]}, {os.cpu_count()} processors")
        self.each(list(tools.FACTS), ask)

    def ceilings(self) -> None:
        self.child("ceilings")  # imports PyTorch while the probe is compiled
        command = self.box.probe_command(Path(__file__).with_name("probe.cu"), self.probe)
        compiled = tools.run(command, 20) if command else None
        about = self.case("device", "ceilings", {"do": "device"})
        if about["status"] != RIGHT:
            self.require_device()
        if "capability" in about:
            major = int(about["capability"].split(".")[0])
            self.arch = 100 if major > 9 else 90 if major == 9 else 80
            self.out.write("device", **{key: value for key, value in about.items() if key != "status"})
        if compiled is None or compiled.status == 0:
            run = tools.run(self.box.probe(self.probe, "clusters"), ALIVE_SECONDS)
            resident = json.loads(run.text) if run.status == 0 else {}
            self.ended("clusters", RIGHT if resident else FAILED, resident=resident, text=run.text[-300:])
        else:
            self.ended("clusters", FAILED, why=compiled.text.strip()[-300:])
        requests = [(name, {"do": name, "bytes": self.shapes.copy_bytes}) for name in ("copy", "read")]
        for m, k, n, transposed in self.shapes.products:
            name = f"product {m} x {k} x {n}{' transposed' if transposed else ''}"
            requests.append((name, {"do": "product", "m": m, "k": k, "n": n, "transposed": transposed}))
        self.each(requests, lambda pair: self.case(pair[0], "ceilings", pair[1]))
        self.drop("ceilings")

    def build(self) -> None:
        self.libraries = self.building.wait(min(self.end, self.out.start + BUILD_SECONDS))
        status = RIGHT if self.libraries in (build.BUILT, build.FOUND) else FAILED
        self.ended("libraries", status, source=self.libraries, why=self.building.why)
        self.out.keep(self.building.log, "build.log", "build")

    # ---- right? ---------------------------------------------------------------------------------------------

    def smoke(self) -> None:
        self.child("main_kernels")  # starts while the small cases run
        variants = self._variants()
        for family in dict.fromkeys(variant["family"] for variant in variants):
            self.child(f"smoke/{family}")

        def check(variant: dict) -> None:
            planted = self.box.planted.pop(variant["case"]["operator"], "")
            self.case(variant["name"], f"smoke/{variant['family']}", {**self._check(variant), "planted": planted})

        self.each(variants, check)
        for name in [name for name in self.children if name.startswith("smoke/")]:
            self.drop(name)

    def _variants(self) -> list[dict]:
        request = {"do": "enumerate", "arch": self.arch, "small": self.shapes.small}
        answer = self.case("list of cases", "smoke/list", request)
        self.drop("smoke/list")
        return answer.get("cases", [])

    def _check(self, variant: dict) -> dict:
        return {"do": "check", "variant": variant, "avoid": self.avoid}

    def main(self) -> None:
        self.child("bench")

        def check(pair: tuple[dict, str]) -> None:
            case, embedding = pair
            name = title(case) + (f", {embedding} E" if case["d"] else "")
            request = {"do": "check", "case": case, "embedding": embedding, "avoid": self.avoid}
            self.case(name, "main_kernels", request)

        self.each(list(self.shapes.main), check)
        self.drop("main_kernels")

    def tests(self) -> None:
        """Test files whose kernels hung are left out."""
        hung = {entry["kernel"] for entry in self.avoid if entry["why"].startswith(HANG)}
        selections, log = tools.selections(self.box, hung), self.scratch / "tests.log"
        for place, (name, command) in enumerate(selections):
            share = self.left * (0.7 if place + 1 < len(selections) else 1.0)
            self.out.write("begin", phase="tests", case=name)
            began, run = time.monotonic(), tools.run(command, share, self.box.environment(), log)
            before_summary = run.text.split("short test summary info")[0]
            counts = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", before_summary))
            failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", run.text)))
            fine = STOPPED if run.status is None else RIGHT if run.status == 0 else FAILED
            status = WRONG if failed or counts["FAILED"] else fine
            self.ended(name, status, began=began, counts=dict(counts), failed=failed[:60], why=run.why)
            self.out.keep(log, "tests.log", name)
            if run.status is None:
                self.require_device()

    # ---- how fast? ------------------------------------------------------------------------------------------

    def _time(self, name: str, child: str, request: dict, **environment: str) -> None:
        self.case(name, child, {**request, "seconds": self.shapes.seconds, "avoid": self.avoid}, **environment)

    def bench(self) -> None:
        operators = [(title(case), {"do": "case", "case": case}) for case in self.shapes.bench]
        draws = []
        for case, spread, forbidden in self.shapes.draws:
            name = f"{title(case)} spread {spread:g}{', forbidden ids' if forbidden else ''}"
            draws.append((name, {"do": "draw", "case": case, "spread": spread, "forbidden": forbidden}))
        first, others = operators[:OPERATORS_BEFORE_DRAWS], operators[OPERATORS_BEFORE_DRAWS:]
        self.each([*first, *draws, *others], lambda pair: self._time(pair[0], "bench", pair[1]))

    def forced(self) -> None:
        """A process for each plan, which it reads once. The next ones start while one measures."""
        plans = list(self.shapes.forced)

        def name_of(plan: Forced) -> str:
            return f"bench/{plan.name}"

        def measure(plan: Forced) -> None:
            place = plans.index(plan)
            for ahead in plans[place : place + AHEAD + 1]:
                self.child(name_of(ahead), ENTRGI_FORCE_PLAN=ahead.plan)
            request = {"do": "case", "case": plan.case, "only": ["entrgi"]}
            self._time(plan.name, name_of(plan), request, ENTRGI_FORCE_PLAN=plan.plan)
            self.drop(name_of(plan))

        self.each(plans, measure)
        for plan in plans:
            self.drop(name_of(plan), at_once=True)

    def step(self) -> None:
        def measure(item: tuple[dict, str, tuple[str, ...]]) -> None:
            case, compile, only = item
            name = title(case) + (f", {' and '.join(only)}" if only else "")
            self._time(name, "bench", {"do": "case", "case": case, "compile": compile, "only": only})

        self.each(list(self.shapes.steps), measure)
        self.drop("bench")

    def end_to_end(self) -> None:
        workload, steps, variants = self.shapes.guided
        build_models = {"do": "build", "workload": workload, "steps": steps}

        def measure(variant: str) -> None:
            name = f"{workload}: {variant}"
            # Where a variant failed the models are gone with its process.
            if "guided" in self.children or self.case(f"models for {name}", "guided", build_models)["status"] == RIGHT:
                self.case(name, "guided", {"do": "variant", "variant": variant, "repeats": 1})

        self.each(list(variants), measure)

    # ---- tools ----------------------------------------------------------------------------------------------

    def ncu(self) -> None:
        program, log = machine.find("ncu"), self.scratch / "ncu.log"
        if program is None:
            return self.ended("counters", SKIPPED, why="ncu is not here")
        self.out.write("begin", phase="ncu", case="counters")
        script = [sys.executable, str(CHILDREN / "counters.py"), *map(str, self.shapes.counted)]
        began, launches, why = time.monotonic(), [], ""
        for metrics in tools.COUNTERS:  # names of counters change: the second list is ncu's own
            if not launches and self.left > 5:
                run = tools.run([program, *metrics, *script], self.left, self.box.environment(), log)
                launches, why = tools.counters(run.text), run.why
                self.out.keep(log, "tools.log", "ncu")
        return self.ended("counters", RIGHT if launches else FAILED, began=began, launches=launches, why=why)

    def sanitize(self) -> None:
        program = machine.find("compute-sanitizer")
        if program is None:
            return self.ended("memcheck", SKIPPED, why="compute-sanitizer is not here")
        variants = [variant for variant in self._variants() if variant["rank"] == 0]
        for tool, most in (("memcheck", 20), ("synccheck", 4)):
            prefix = f"{program} --tool {tool} --report-api-errors no --error-exitcode 99"

            def check(variant: dict, tool: str = tool, prefix: str = prefix) -> None:
                self.case(f"{tool}: {variant['name']}", f"smoke/{tool}", self._check(variant), prefix=prefix)

            self.each(variants[:: max(1, len(variants) // most)][:most], check)
            self.case(f"{tool}: findings", f"smoke/{tool}", {"do": "findings"}, prefix=prefix)
        return None
