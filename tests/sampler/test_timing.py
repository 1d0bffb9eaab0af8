"""Spans: what a recorder measures, what they cost without one, and that they change nothing."""

import threading
import time
from contextlib import suppress

import pytest
import torch

import entrgi
from entrgi import timing
from entrgi.timing import Recorder, span
from support import tiny

OPTIONS = {"max_new_tokens": 4, "steps": 4, "num_return_sequences": 2, "guidance_steps": 2, "seed": 0}
GUIDED = {
    "denoiser": 1,
    "sample_tokens": 3,
    "relaxed_embedding": 2,
    "reward forward": 2,
    "reward backward": 2,
    "logit_update": 2,
    "commit": 1,
}


class Clock:
    """Stands in for ``time.perf_counter``: time passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", result)
    return result


def test_parts_and_idle_add_up(clock: Clock) -> None:
    with Recorder() as recorder:
        for _ in range(2):
            with span("step"):
                clock.now += 1
                with span("outer"):
                    clock.now += 2
                    with span("inner"):
                        clock.now += 4
                    clock.now += 8
                with span("outer"):
                    clock.now += 16
                clock.now += 32
    first, second = recorder.steps()
    assert (first.index, second.index) == (0, 1)
    assert first.seconds == first.host_seconds == 63
    assert first.idle == 33
    assert list(first.spans) == ["outer", "inner"]
    assert first.spans["outer"].seconds == [10, 16]
    assert first.spans["inner"].seconds == [4]
    assert first.spans["outer"].calls == 2
    assert sum(each.total for each in first.spans.values()) + first.idle == first.seconds


def test_only_finished_steps_count(clock: Clock) -> None:
    with Recorder() as recorder:
        with span("score"):
            clock.now += 1
        with span("step"), span("denoiser"):
            clock.now += 2
        recorder.begin("step")
        with span("denoiser"):
            clock.now += 4
        (step,) = recorder.steps()
    assert step.seconds == step.spans["denoiser"].total == 2


def test_an_exception_closes_its_spans(clock: Clock) -> None:
    with Recorder() as recorder:
        with suppress(ValueError), span("step"), span("denoiser"):
            clock.now += 1
            raise ValueError
        with span("step"):
            clock.now += 2
    assert [(step.seconds, step.idle) for step in recorder.steps()] == [(1, 0), (2, 2)]


def test_nothing_is_recorded_outside() -> None:
    assert span("a") is span("b")
    with Recorder() as recorder:
        assert span("a") is not span("a")
    with span("step"):
        pass
    assert recorder.steps() == []


def test_a_recorder_hears_its_own_thread_only() -> None:
    def work() -> None:
        with span("step"):
            pass

    with Recorder() as recorder:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        work()
    assert len(recorder.steps()) == 1


def test_a_span_costs_next_to_nothing() -> None:
    """A step has about twenty; two microseconds each would still be nothing."""
    start = time.perf_counter()
    for _ in range(20_000):
        with span("denoiser"):
            pass
    assert time.perf_counter() - start < 20_000 * 2e-6


@pytest.mark.parametrize(
    ("guidance", "expected"), [("entrgi", GUIDED), ("none", ("denoiser", "sample_tokens", "commit"))]
)
def test_the_driver_names_its_parts(guidance: str, expected: object) -> None:
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    with Recorder() as recorder:
        entrgi.generate("the movie was", denoiser, reward, guidance=guidance, **OPTIONS)
    expected = expected if isinstance(expected, dict) else dict.fromkeys(expected, 1)
    steps = recorder.steps()
    assert len(steps) == 3  # the first of the schedule's four commits nothing
    for step in steps:
        assert {name: each.calls for name, each in step.spans.items()} == expected
        assert step.idle > 0


def test_recording_changes_no_token() -> None:
    denoiser, reward = tiny.denoiser(), tiny.bert_reward()
    plain = entrgi.generate("the movie was", denoiser, reward, **OPTIONS)
    with Recorder():
        recorded = entrgi.generate("the movie was", denoiser, reward, **OPTIONS)
    assert torch.equal(plain.sequences, recorded.sequences)
    assert torch.equal(plain.rewards, recorded.rewards)


class Event:
    """Stands in for ``torch.cuda.Event``: the device reaches the n-th one at n squared milliseconds."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = None

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.at, Event.made = Event.made**2, Event.made + 1

    def elapsed_time(self, end: "Event") -> float:
        return float(end.at - self.at)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A CUDA device that only counts how often the host waits for it."""
    state = {"waits": 0, "capturing": False}
    Event.made = 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: state.update(waits=state["waits"] + 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def test_cuda_is_timed_by_events_and_read_at_the_end(events: dict[str, object]) -> None:
    with Recorder("cuda") as recorder:
        with span("step"), span("denoiser"):  # events 0 and 3, 1 and 2
            pass
        assert events["waits"] == 0
    (step,) = recorder.steps()
    assert events["waits"] == 1
    assert step.seconds == pytest.approx(9e-3)
    assert step.spans["denoiser"].seconds == [pytest.approx(3e-3)]
    assert step.idle == pytest.approx(6e-3)
    assert 0 < step.host_seconds < 1


def test_a_capture_is_not_timed(events: dict[str, object]) -> None:
    with Recorder("cuda") as recorder, span("step"):
        events["capturing"] = True
        with span("denoiser"):
            pass
        events["capturing"] = False
    (step,) = recorder.steps()
    assert step.spans == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_on_a_device() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    x @ x
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Recorder("cuda") as recorder, span("step"), span("product"):
            for _ in range(50):
                x = (x @ x).clamp(-1, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (step,) = recorder.steps()
    assert 0.5 < step.spans["product"].total / step.seconds <= 1
