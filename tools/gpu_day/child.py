"""A child process that answers requests, one JSON line each, and may never answer."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

START_SECONDS = 90.0  # imports of torch and of the package, from a disk that is cold
CHILDREN = Path(__file__).with_name("children")


class Expired(Exception):
    """No answer within the deadline."""


class Ended(Exception):
    """The process ended instead of answering."""


def end_group(process: subprocess.Popen) -> None:
    """SIGKILL to a child that leads its own process group, and to all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Child:
    """``children/NAME.py``, started at once; what it prints elsewhere than in answers goes to its log.

    It says {"note": ...} when it is ready, which process of it holds the device, under which plans it is about to
    launch and, with ``launching``, that it waits for nothing but such a launch.
    """

    def __init__(self, script: str, arguments: list[str], environment: dict[str, str], log: Path):
        self.log, self.buffer, self.ready = log, b"", False
        self.began = time.monotonic()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILDREN / f"{script}.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                preexec_fn=os.setpgrp,
            )
        self.device_pid, self.plans, self.launching = self.process.pid, [], False
        self.answered = False

    def ask(self, request: dict, seconds: float) -> dict:
        """The answer.

        Raises:
            Expired: none within ``seconds``; imports of a fresh process do not count.
            Ended: the process is gone.
        """
        self.plans, self.launching = [], False
        while not self.ready:
            self._line(self.began + START_SECONDS)
        end = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self.last_words()) from None
        while (answer := self._line(end)) is None:
            pass
        self.answered = True
        return answer

    def _line(self, end: float) -> dict | None:
        """The next line, None where it was a note."""
        while b"\n" not in self.buffer:
            readable, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0.0))
            if not readable:
                raise Expired(f"no answer within {end - self.began:.0f} s of its start" if not self.ready else "")
            if not (data := os.read(self.process.stdout.fileno(), 1 << 16)):
                raise Ended(self.last_words())
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        if (note := message.get("note")) is None:
            return message
        self.ready = self.ready or bool(note.get("ready"))
        self.device_pid = note.get("device_pid", self.device_pid)
        self.plans = note.get("plans", self.plans)
        self.launching = note.get("launching", self.launching)
        return None

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][:400] if lines else "the process ended without a word"

    def where(self) -> str:
        """What the device runs for this child, by cuda-gdb: kernels and warps."""
        command = ["timeout", "20", "cuda-gdb", "-p", str(self.device_pid), "-batch"]
        command += ["-ex", "info cuda kernels", "-ex", "info cuda warps"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=25, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as failure:
            return str(failure)
        return (run.stdout + run.stderr)[-20_000:]

    def close(self, seconds: float = 2.0) -> None:
        """Lets it end by itself, else ends it."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(seconds)
        end_group(self.process)
