"""Where the time of a denoising step goes: named spans, measured only while a :class:`Recorder` is active.

The driver wraps its parts in ``with span("denoiser"):``. Without a recorder that costs a fraction of a microsecond and
does nothing; with one, host time is read on the CPU, and on CUDA events are put into the stream and read when the
recording is over, so that the host never waits for the device in between.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch

STEP = "step"  # the span around one denoising step

_active: ContextVar[Recorder | None] = ContextVar("entrgi.timing.recorder", default=None)
_nothing = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Measure the enclosed work as ``name`` where a :class:`Recorder` is active; spans may nest.

    Spans inside a CUDA graph capture are not measured: their events would time the capture, not the replays.
    """
    recorder = _active.get()
    if recorder is None or (recorder.on_cuda and torch.cuda.is_current_stream_capturing()):
        return _nothing
    return _Span(recorder, name)


@dataclass
class SpanTimes:
    """All spans of one name in one denoising step.

    Attributes:
        seconds: of each call, in order, without the spans nested in it.
    """

    seconds: list[float] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.seconds)

    @property
    def total(self) -> float:
        return sum(self.seconds)


@dataclass
class StepTimes:
    """One denoising step; ``sum(span.total) + idle == seconds``.

    Attributes:
        index: 0, 1, ... in the order in which the steps were made.
        seconds: of the whole step.
        host_seconds: in which the host carried the step out; on CUDA, in which it put the work into the stream. Where
            the two are close to each other, the device waits for the host.
        idle: seconds of the step outside all spans in it.
        spans: by name, in the order in which they first began.
    """

    index: int
    seconds: float
    host_seconds: float
    idle: float
    spans: dict[str, SpanTimes]


@dataclass
class _Mark:
    """One span as it was recorded: host seconds, and CUDA events where there are any."""

    name: str
    parent: int | None
    host: list[float] = field(default_factory=list)
    events: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.host) == 2

    @property
    def host_seconds(self) -> float:
        return self.host[1] - self.host[0] if self.ended else 0.0

    @property
    def seconds(self) -> float:
        return 1e-3 * self.events[0].elapsed_time(self.events[1]) if len(self.events) == 2 else self.host_seconds


class Recorder:
    """Records the spans of the code run in its context, in this thread.

    Args:
        device: where the work runs. CUDA: spans last from when the device reaches them to when it leaves them,
            on the current stream; time in which the device waits for the host inside a span counts as the span's.

    Example:
        >>> with Recorder(denoiser.device) as recorder:
        ...     entrgi.generate(prompts, denoiser, reward)
        >>> recorder.steps()[0].spans["denoiser"].total
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self._marks: list[_Mark] = []
        self._open: list[int] = []
        self._token: Token | None = None

    def __enter__(self) -> Recorder:
        self._token = _active.set(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        _active.reset(self._token)

    def begin(self, name: str) -> None:
        """Open a span; :func:`span` calls it."""
        self._marks.append(_Mark(name, self._open[-1] if self._open else None))
        self._open.append(len(self._marks) - 1)
        self._stamp(self._marks[-1])

    def end(self) -> None:
        """Close the span opened last; :func:`span` calls it."""
        self._stamp(self._marks[self._open.pop()])

    def steps(self) -> list[StepTimes]:
        """The denoising steps recorded so far and finished. Waits for the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        own = [mark.seconds for mark in self._marks]  # without what is nested in it
        for mark in self._marks:
            if mark.parent is not None:
                own[mark.parent] -= mark.seconds
        result: list[StepTimes] = []
        owner: list[StepTimes | None] = []  # the step that each mark lies in
        for mark, seconds in zip(self._marks, own, strict=True):
            step = owner[mark.parent] if mark.parent is not None else None
            if step is not None:
                step.spans.setdefault(mark.name, SpanTimes()).seconds.append(seconds)
            elif mark.name == STEP and mark.ended:
                step = StepTimes(len(result), mark.seconds, mark.host_seconds, seconds, {})
                result.append(step)
            owner.append(step)
        return result

    def _stamp(self, mark: _Mark) -> None:
        mark.host.append(time.perf_counter())
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            mark.events.append(event)


class _Span:
    __slots__ = ("name", "recorder")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __enter__(self) -> None:
        self.recorder.begin(self.name)

    def __exit__(self, *_exception: object) -> None:
        self.recorder.end()
