"""The timetable: what is done, how long it may take, and what is left out where there is less time."""

from __future__ import annotations

import time
from dataclasses import dataclass

REPORT_SECONDS = 6.0  # for the table at the end


@dataclass(frozen=True)
class Phase:
    """One line of the timetable.

    Attributes:
        seconds: it gets so many at least, unless a more important one after it would miss them.
        rank: importance, 0 the highest; the last ones are left out where the time does not suffice for all.
        needs: what must be there: "libraries" of the package, or nothing.
        alone: not part of a whole day, only of ``--only``.
    """

    name: str
    seconds: float
    rank: int
    about: str
    needs: str = ""
    alone: bool = False


PHASES = (
    Phase("facts", 10, 0, "driver, compilers, tools; the build begins in the background"),
    Phase("ceilings", 30, 1, "copy, read-only sum, matrix products; clusters that the device holds"),
    Phase("build", 50, 2, "waits for the build, until second 90; then the libraries brought along"),
    Phase("smoke", 45, 3, "every kernel, tile, cluster and dtype, small, against fp64", needs="libraries"),
    Phase("main", 45, 5, "the main kernels at V = 152,064, all rows, twice, against fp64", needs="libraries"),
    Phase("tests", 95, 7, "the kernel tests; graphs, no waiting for the device, 2^31 elements", needs="libraries"),
    Phase("bench", 120, 4, "every operator against floors and PyTorch", needs="libraries"),
    Phase("forced", 55, 8, "plans against each other: clusters, tiles, kernels", needs="libraries"),
    Phase("step", 55, 6, "the whole Adam step against PyTorch, compiled too", needs="libraries"),
    Phase("ncu", 30, 9, "hardware counters of four launches", needs="libraries"),
    Phase("sanitize", 40, 10, "memcheck and synccheck over small launches", needs="libraries"),
    Phase("end-to-end", 200, 11, "16 of 128 steps of a 7B-shaped guided generation", needs="libraries", alone=True),
)
ALWAYS = ("facts", "build")


def chosen(deadline: float, only: tuple[str, ...] = ()) -> list[Phase]:
    """The phases of a run in order: those asked for, else the most important ones that fit."""
    if only:
        return [phase for phase in PHASES if phase.name in (*only, *ALWAYS)]
    left, names = deadline - REPORT_SECONDS, set()
    for phase in sorted(PHASES, key=lambda phase: phase.rank):
        if not phase.alone and phase.seconds <= left:
            names.add(phase.name)
            left -= phase.seconds
    return [phase for phase in PHASES if phase.name in names]


class Clock:
    """Hands out the time of a run: a phase that ends early leaves its rest to the next.

    One that begins late takes its seconds from less important ones only.
    """

    def __init__(self, deadline: float, phases: list[Phase], start: float):
        self.end, self.phases, self.start = start + deadline - REPORT_SECONDS, phases, start

    @property
    def left(self) -> float:
        """Seconds until the table must be printed."""
        return self.end - time.monotonic()

    def limit(self, phase: Phase) -> float:
        """When a phase that begins now must end (``time.monotonic``)."""
        place = self.phases.index(phase)
        later = self.phases[place + 1 :]
        reserved = sum(other.seconds for other in later if other.rank < phase.rank)
        planned = self.start + sum(other.seconds for other in self.phases[: place + 1])
        if not later:
            planned = self.end
        return min(max(time.monotonic() + phase.seconds, planned), self.end - reserved)
