"""Cases, the children that do them, and what follows where one hangs, fails or is wrong."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from .child import Child, Ended, Expired, end_group
from .machine import Machine
from .phases import Clock, Phase
from .records import FAILED, HANG, STOPPED, WRONG, Records

ALIVE_SECONDS, TORCH_SECONDS, DEBUGGER_SECONDS = 10.0, 20.0, 30.0
TILE = ("kernel", "block_m", "block_n", "cluster_m", "cluster_n")
# An error of the device, which stays with the process that met it.
DEVICE_ERROR = re.compile(r"cudaError|CUDA error|illegal memory|misaligned|launch failure")


class DeviceGone(RuntimeError):
    """A fresh process cannot allocate any more: nothing that follows would be true."""


class Session:
    """One run's processes.

    Attributes:
        avoid: fields of plans that are not launched again, each with its reason.
        phase, end: the phase that is under way, and when it must be over (``time.monotonic``).
    """

    def __init__(self, box: Machine, clock: Clock, out: Records):
        self.box, self.clock, self.out = box, clock, out
        self.scratch, self.probe = box.scratch, box.scratch / "probe"
        self.children: dict[str, Child] = {}
        self.avoid: list[dict] = []
        self.debugged: set[str] = set()
        self.arch, self.end = 90, 0.0
        self.phase: Phase = clock.phases[0]

    @property
    def left(self) -> float:
        """Seconds of the phase."""
        return self.end - time.monotonic()

    def case(self, name: str, child: str, request: dict, **options: str) -> dict:
        """Asks a child; whatever happens is written, and the child is there again for the next case."""
        self.out.write("begin", phase=self.phase.name, case=name)
        began, process, expired = time.monotonic(), self.child(child, **options), False
        # The first time the driver is initialised and code is loaded.
        seconds = self.box.seconds[self.phase.name] * (1 if process.answered else 2)
        seconds = min(seconds, max(self.clock.left, 0.1))
        try:
            answer = process.ask(request, seconds)
        except Expired as late:
            answer, expired = self._expired(child, process, seconds, str(late)), True
        except Ended as ended:
            self.drop(child)
            answer = {"status": FAILED, "why": str(ended)}
        broken = answer["status"] == FAILED and DEVICE_ERROR.search(answer.get("why", ""))
        if answer["status"] == WRONG or broken:
            why = f"{answer['status']} in {self.phase.name}: {name}"
            self.avoid += [{**plan, "why": why} for plan in process.plans]
        kernels = [plan["kernel"] for plan in process.plans]
        self.ended(name, **{"began": began, "kernels": kernels, **answer})
        if broken:
            self.drop(child, at_once=True)
        if broken or (expired and answer["status"] != STOPPED):
            self.require_device()
        return answer

    def ended(self, case: str, status: str, began: float | None = None, **fields: object) -> None:
        """The record of a case that is over."""
        if began is not None:
            fields["seconds"] = round(time.monotonic() - began, 2)
        self.out.write("end", phase=self.phase.name, case=case, status=status, **fields)

    def each(self, cases: list, run: Callable[[object], None]) -> None:
        """All of them until the phase's time is over; what was not reached is counted."""
        for place, case in enumerate(cases):
            if self.left <= 0:
                self.out.write("cut", phase=self.phase.name, left=len(cases) - place, of=len(cases))
                return
            run(case)

    def _expired(self, name: str, process: Child, seconds: float, why: str) -> dict:
        """A hang: what the device does, and an end to the process."""
        if not process.ready:
            self.drop(name, at_once=True)
            return {"status": FAILED, "why": why}
        if self.clock.left < 1:
            self.drop(name, at_once=True)
            return {"status": STOPPED, "why": "the time is up"}
        why = f"no answer within {seconds:.0f} s"
        if not process.launching:
            self.drop(name, at_once=True)
            return {"status": FAILED, "why": f"{why}, in nothing of this package's"}
        kernels = " ".join(plan["kernel"] for plan in process.plans)
        if not self.box.dry and kernels not in self.debugged and self.clock.left > 2 * DEBUGGER_SECONDS:
            self.debugged.add(kernels)
            log = self.scratch / "debugger.log"
            log.write_text(process.where())
            self.out.keep(log, "hangs.log", f"{kernels or name}: cuda-gdb")
        self.drop(name, at_once=True)
        for plan in process.plans:
            fields = {field: plan[field] for field in TILE if field in plan}
            if any(entry["kernel"] == plan["kernel"] and entry["why"].startswith(HANG) for entry in self.avoid):
                fields = {"kernel": plan["kernel"]}  # the second time: whatever its tile
            self.avoid.append({**fields, "why": f"{HANG} in {self.phase.name}"})
        return {"status": HANG, "why": why}

    def require_device(self) -> None:
        """A fresh process allocates and writes.

        Raises:
            DeviceGone: it does not, within ten seconds.
        """
        command = self.box.probe(self.probe, "alive")
        limit = ALIVE_SECONDS if self.probe.exists() else ALIVE_SECONDS + TORCH_SECONDS
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            alive, why = '"alive"' in run.stdout, run.stdout.strip() or run.stderr.strip()[-300:]
        except subprocess.TimeoutExpired:
            alive, why = False, f"no answer within {limit:.0f} s"
        self.out.write("alive" if alive else "dead", phase=self.phase.name, why=why)
        if not alive:
            raise DeviceGone(f"a fresh process cannot use the device: {why}")

    # ---- children -------------------------------------------------------------------------------------------

    def child(self, name: str, prefix: str = "", **environment: str) -> Child:
        """``script`` or ``script/something``: a process that is kept until it fails."""
        if name not in self.children:
            script, arguments = self.box.script(name.split("/")[0])
            log = self.scratch / f"{re.sub('[^a-z0-9]+', '_', name)[:80]}.log"
            self.children[name] = Child(script, arguments, self.box.environment(prefix, **environment), log)
        return self.children[name]

    def drop(self, name: str, at_once: bool = False) -> None:
        """Ends a child, if there is one of this name, and keeps what it said."""
        with suppress(KeyError):
            child = self.children.pop(name)
            if at_once:
                end_group(child.process)
            else:
                child.close()
            self.out.keep(child.log, "children.log", name)
            child.log.unlink(missing_ok=True)

    def drop_all(self) -> None:
        for name in list(self.children):
            self.drop(name, at_once=True)
