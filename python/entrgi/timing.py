"""Where time goes: named spans, and the phases of a generation that ``Output.timings`` reports. One clock for both.

The driver wraps its parts in ``with span("denoiser"):``, which is measured while a :class:`Recorder` is active and
otherwise costs a fraction of a microsecond, and its phases in ``with phase("guide"):``, which every generation measures
with a :class:`PhaseRecorder`. Host time is read on the CPU; on CUDA, events are put into the stream and read when the
recording is over, so that the host never waits for the device in between.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

STEP = "step"  # the span, and the phase, around one denoising step
PHASES = ("denoise", "guide", "commit", "score")

_spans: ContextVar[Recorder | None] = ContextVar("entrgi.timing.spans", default=None)
_phases: ContextVar[Recorder | None] = ContextVar("entrgi.timing.phases", default=None)
_nothing = nullcontext()


def span(name: str) -> AbstractContextManager[Mark | None]:
    """Measure the enclosed work as ``name`` where a :class:`Recorder` is active; spans may nest.

    Spans inside a CUDA graph capture are not measured: their events would time the capture, not the replays.
    """
    recorder = _spans.get()
    if recorder is None or (recorder.on_cuda and torch.cuda.is_current_stream_capturing()):
        return _nothing
    return _Span(recorder, name)


def phase(name: str) -> AbstractContextManager[Mark | None]:
    """Measure the enclosed work as ``name`` for the :class:`PhaseRecorder` of the generation that runs it."""
    recorder = _phases.get()
    return _nothing if recorder is None else _Span(recorder, name)


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
class Mark:
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

    _active: ClassVar[ContextVar[Recorder | None]] = _spans

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self._marks: list[Mark] = []
        self._open: list[int] = []
        self._token: Token | None = None

    def __enter__(self) -> Self:
        self._token = self._active.set(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._token is not None
        self._active.reset(self._token)

    def begin(self, name: str) -> Mark | None:
        """Open a span; :func:`span` calls it."""
        mark = Mark(name, self._open[-1] if self._open else None)
        self._marks.append(mark)
        self._open.append(len(self._marks) - 1)
        self._stamp(mark)
        return mark

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

    def _stamp(self, mark: Mark) -> None:
        mark.host.append(time.perf_counter())
        if self.on_cuda:
            with suppress(RuntimeError):  # of a device that has failed: whoever uses it next is told
                event = torch.cuda.Event(enable_timing=True)
                event.record(torch.cuda.current_stream(self.device))
                mark.events.append(event)


class PhaseRecorder(Recorder):
    """Records the phases of one generation, whether or not a :class:`Recorder` listens to its spans."""

    _active = _phases

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        self._began = time.perf_counter()

    def timings(self) -> dict[str, float]:
        """Seconds of each of :data:`PHASES`, and ``total``: on the host, since the recorder was made. Waits for the
        device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        totals = dict.fromkeys(PHASES, 0.0)
        for mark in self._marks:
            if mark.name in totals:
                totals[mark.name] += mark.seconds
        return {**totals, "total": time.perf_counter() - self._began}


class _Span:
    __slots__ = ("name", "recorder")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __enter__(self) -> Mark | None:
        return self.recorder.begin(self.name)

    def __exit__(self, *_exception: object) -> None:
        self.recorder.end()
