"""How long a call takes and how much memory it needs, on the CPU and on CUDA.

On CUDA calls are captured in a graph that runs them over all sets of inputs in turn, and replays are timed by events;
what cannot be captured is timed by events around plain calls, with the delays of the host. On the CPU all
implementations take turns, call by call. What fails is left out, with its error. Everything is measured twice, in two
halves: the difference of their medians is the noise.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

Calls = list[Callable[[], object]]  # one for each set of inputs
LEAST_GRAPH_MS = 0.2  # a graph shorter than that would be timed at the resolution of events


@dataclass(frozen=True)
class Limits:
    """How long is measured: until ``seconds`` have passed for an implementation, within these numbers of calls."""

    seconds: float = 0.8
    least: int = 5
    most: int = 40


@dataclass
class Times:
    """Milliseconds of one call.

    Attributes:
        how: ``host``, ``graph``, ``events``, or ``events (no capture)`` where a capture failed.
        failure: what ended the measurement.
    """

    halves: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    how: str = "host"
    failure: Exception | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.halves[0] + self.halves[1])

    @property
    def noise(self) -> float:
        """Difference of the medians of two measurements of the same thing, over the median."""
        first, second = (statistics.median(half) for half in self.halves)
        return abs(first - second) / self.median

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Keeps a failure of the body."""
        try:
            yield
        except Exception as failure:
            self.failure = failure


def measure(
    calls: dict[str, Calls], captured: dict[str, bool], device: torch.device, limits: Limits
) -> dict[str, Times]:
    """Time every entry of ``calls``; all were called before."""
    if device.type == "cuda":
        return _measure_cuda(calls, captured, limits)
    times, rounds = {name: Times() for name in calls}, dict.fromkeys(calls, 0)
    for name, each in calls.items():
        with times[name].attempt():
            rounds[name] = _count(_host_ms(each[0]), limits)
    for turn in range(max(rounds.values())):
        for name, each in calls.items():
            if turn < rounds[name] and times[name].failure is None:
                with times[name].attempt():
                    half = times[name].halves[2 * turn >= rounds[name]]
                    half.append(_host_ms(each[turn % len(each)]))
    return times


def _count(ms: float, limits: Limits) -> int:
    return min(max(int(1e3 * limits.seconds / max(ms, 1e-3)), limits.least), limits.most)


def _host_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _event_ms(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _measure_cuda(calls: dict[str, Calls], captured: dict[str, bool], limits: Limits) -> dict[str, Times]:
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    times = {name: Times(how="events") for name in calls}
    for name, each in calls.items():
        with times[name].attempt():
            runs[name] = _prepared(each, captured[name], times[name])
    for half in range(2):
        for name, (run, count) in runs.items():
            if times[name].failure is None:
                with times[name].attempt():
                    ms = _event_ms(run)  # warms up
                    times[name].halves[half].extend(_event_ms(run) / count for _ in range(_count(2 * ms, limits)))
    return times


def _prepared(each: Calls, captured: bool, times: Times) -> tuple[Callable[[], object], int]:
    """What is timed at once, and how many calls that are."""

    def all_sets() -> None:
        for call in each:
            call()

    all_sets()
    loops = max(1, int(LEAST_GRAPH_MS / max(_event_ms(all_sets), 1e-3)))
    if captured:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(loops):
                    all_sets()
            graph.replay()
            times.how = "graph"
            return graph.replay, loops * len(each)
        except RuntimeError:
            torch.cuda.synchronize()  # raises where the device itself has failed
            times.how = "events (no capture)"
    all_sets()
    return all_sets, len(each)


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def sets_beyond_cache(bytes_of_call: int, device: torch.device) -> int:
    """How many sets of inputs are twice the cache together."""
    most = 512 if device.type == "cuda" else 64
    return min(max(-(-2 * cache_bytes(device) // max(bytes_of_call, 1)), 1), most)


@contextmanager
def measuring_stream(device: torch.device) -> Iterator[None]:
    """Everything is prepared, captured and timed on one stream of its own: backward passes run on their forward's."""
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError where the body takes longer, whatever the body made of it (main thread only)."""
    message, expired = f"more than {seconds:g} s", False

    def expire(_signal: int, _frame: object) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as failure:
        if expired:  # torch.compile wraps every exception in its own
            raise TimeoutError(message) from failure
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise TimeoutError(message)


class PeakMemory:
    """The most memory in use since the last :meth:`start`, above what was in use then.

    On the CPU the resident set's high-water mark; None where there is no /proc.
    """

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.before = _resident("VmRSS")

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return _resident("VmHWM") - self.before if Path("/proc/self/clear_refs").exists() else None


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")
