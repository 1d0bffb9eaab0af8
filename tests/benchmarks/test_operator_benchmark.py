"""``benchmarks/operators.py`` measures what it says it measures, and ``bench_check.py`` finds a slower operator."""

import contextlib
import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_check
import operators
import provenance
from operator_bench import measure, report, results, timing
from operator_bench.cases import OPERATORS, QUICK, SELECTIONS, Case, Inputs, cases_of
from operator_bench.correctness import Truth, WrongResult
from operator_bench.registry import Implementation, registry
from operator_bench.targets import judge

TINY = ["--device", "cpu", "--vocab", "1003", "--dims", "24", "--repeats", "2", "--threads", "1", "--compile", "none"]
SMALL = Case("adam_step_middle", 3, 1003, 24, "float32", "float32")
CPU = torch.device("cpu")
FEW = timing.Limits(seconds=0.01, least=2, most=4)


@pytest.fixture
def output(tmp_path):
    pytest.importorskip("matplotlib")
    return tmp_path / "results" / "operators_cpu"


def run(output, *arguments):
    return operators.main([*TINY, "--output", str(output), *arguments])


@pytest.fixture
def small_machine(monkeypatch):
    """Caches of nothing: one set of inputs."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)


# ---- measuring -------------------------------------------------------------------------------------------------


def test_every_operator_is_measured(output, small_machine):
    assert run(output, "--rows", "3", "--seconds", "0.001", "--dtypes", "float32") == 0
    with output.with_suffix(".csv").open() as file:
        table = csv.DictReader(file)
        rows = list(table)
        assert tuple(table.fieldnames) == results.COLUMNS
    assert json.loads(output.with_suffix(".json").read_text()) == results.read(output)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {row["operator"] for row in rows} == set(OPERATORS)
    for row in rows:
        if row["implementation"] == "flashinfer":
            assert row["status"].endswith(("not installed", "needs CUDA"))
            continue
        assert row["status"] == "measured"
        assert float(row["median_ms"]) > 0
        assert float(row["over_floor"]) == pytest.approx(float(row["median_ms"]) / float(row["floor_ms"]), rel=0.01)
        assert float(row["noise"]) >= 0
        assert row["timing"] == "host"
        assert (row["gemm_ms"] != "") == bool(OPERATORS[row["operator"]].products)
        assert (row["over_published"] != "") == (row["implementation"] == "entrgi")
        assert row["target"] == row["met"] == ""  # asked for on GPUs only
    whole = {row["implementation"]: row for row in rows if row["operator"] == "adam_iteration"}
    assert set(whole) >= {"entrgi", "published", "composed"}
    assert float(whole["entrgi"]["error"]) < 1e-5


@pytest.mark.slow
def test_compiled_baselines(output, small_machine):
    arguments = ["--rows", "3", "--seconds", "0.001", "--compile", "all", "--dtypes", "float32"]
    assert run(output, *arguments, "--only", "relaxed_embedding", "adam_iteration") == 0
    measured = {row["implementation"] for row in results.read(output) if row["median_ms"] is not None}
    assert measured == {"entrgi", "published", "compiled", "composed", "two-pass"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("operator", ["logit_gradient", "adam_step_first", "adam_step_middle", "adam_step_last"])
def test_product_and_one_compiled_pass(operator, dtype):
    """The strongest composition of the update is an update: the check of the benchmark itself, and moments in fp32."""
    inputs = Inputs(Case(operator, 3, 1003, 24, dtype, dtype), CPU)
    result = registry()[operator]["two-pass"].build(inputs, 0)()
    assert Truth(inputs).check("two-pass", result) < (1e-5 if dtype == "float32" else 0.2)
    assert all(moment.dtype == torch.float32 for name, moment in result.items() if name == "exp_avg")


def test_a_run_can_be_resumed(output, small_machine, monkeypatch):
    measured = []
    original = operators.measure_case

    def watched(case, settings):
        measured.append(case)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(case, settings)

    monkeypatch.setattr(operators, "measure_case", watched)
    arguments = ["--rows", "2", "4", "--only", "logit_statistics", "greedy", "--dtypes", "float32", "--commit", "abc"]
    assert run(output, *arguments) == 3
    first = results.read(output)
    assert {results.case_key(row) for row in first} == {case.key for case in measured[:2]}
    assert run(output, *arguments, "--resume") == 0
    assert len(measured) == 5  # the interrupted one again, and the last
    rows = results.read(output)
    assert rows[: len(first)] == first
    assert len({results.case_key(row) for row in rows}) == 4
    assert run(output, *arguments, "--resume") == 0
    assert len(measured) == 5
    assert run(output, *[*arguments[:-1], "abd"], "--resume") == 0  # another commit: all of them
    assert len(measured) == 9
    assert {row["commit"] for row in results.read(output)} == {"abd"}


@pytest.mark.parametrize(
    "other",
    [{"commit": "abd"}, {"commit": "abc-dirty"}, {"torch": "3"}, {"threads": 2}, {"device": "b"}, {"forced": "p"}],
)
def test_only_rows_of_the_same_code_and_machine_are_kept(output, other):
    about = {"device": "a", "threads": 1, "torch": "2", "commit": "abc", "forced": None}
    here, there = results.Results(output, about), results.Results(output, about | other)
    here.add(SMALL, [{**vars(SMALL), "implementation": "entrgi"}])
    there.cases = here.cases
    assert here.has(SMALL)
    assert not there.has(SMALL)
    for commit in ("none", "abc-dirty"):  # two of these may be different code
        unnamed = results.Results(output, about | {"commit": commit})
        unnamed.add(SMALL, [{**vars(SMALL), "implementation": "entrgi"}])
        assert not unnamed.has(SMALL)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--rows", "-1"), ("--rows", "0"), ("--vocab", "0"), ("--dims", "x"), ("--threads", "0"), ("--repeats", "0")),
        *(("--repeats", "-1"), ("--seconds", "-1"), ("--seconds", "nan"), ("--time-budget", "-5")),
        *(("--compile-seconds", "0"), ("--rows", "99999999999999999999"), ("--time", "5")),
    ],
)
def test_bad_options_are_refused(output, capsys, option, value):
    with pytest.raises(SystemExit):
        run(output, option, value)
    assert option in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(output, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        operators.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_forced_plans_are_no_ordinary_results(output, small_machine, capsys, monkeypatch):
    monkeypatch.setenv("ENTRGI_FORCE_PLAN", "commit_:block_m=1")
    with pytest.raises(SystemExit):
        operators.main(TINY)
    with pytest.raises(SystemExit):
        bench_check.main(["--device", "cpu"])
    assert capsys.readouterr().err.count("ENTRGI_FORCE_PLAN") >= 2
    assert run(output, "--rows", "2", "--only", "commit") == 0
    assert {row["forced"] for row in results.read(output)} == {"commit_:block_m=1"}


def test_dtypes_of_logits_may_be_others(output, small_machine):
    assert run(output, "--rows", "2", "--only", "greedy", "relaxed_embedding", "--dtypes", "bfloat16",
               "--logits-dtypes", "float32", "float16") == 0  # fmt: skip
    found = {(row["operator"], row["logits"], row["embedding"]) for row in results.read(output)}
    assert ("relaxed_embedding", "float32", "bfloat16") in found
    assert len(found) == 4


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance(1)["commit"] == "none"


def test_a_run_keeps_its_budget(output, small_machine):
    assert run(output, "--rows", "2", "4", "8", "--only", "greedy", "--time-budget", "1e-9") == 3
    assert len({results.case_key(row) for row in results.read(output)}) <= 1


def test_a_wrong_implementation_is_not_timed(output, small_machine, monkeypatch, capsys):
    from operator_bench import ours

    def wrong(x, s):
        call = ours.relaxed_embedding(x, s)
        return lambda: {name: 1.02 * tensor for name, tensor in call().items()}

    monkeypatch.setitem(ours.CALLS, "relaxed_embedding", wrong)
    assert run(output, "--rows", "2", "--only", "relaxed_embedding") == 2
    assert "wrong result" in capsys.readouterr().out
    assert results.read(output) == []


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_faults_of_each_kind_are_noticed(operator, dtype):
    """Every result of every operator is checked: one that is off by a tenth is wrong."""
    what = OPERATORS[operator]
    case = Case(operator, 5, 1003, 24 if what.products else 0, dtype, dtype)
    x = Inputs(case, CPU, lr=1e6 if operator == "sgd_step" else 0.5)
    truth, right = Truth(x), registry()[operator]["entrgi"].build(x, 0)()
    truth.check("entrgi", right)
    checked = {"probability", "margin", "filtered_entropy", "argmax", "token", "tokens"}
    for name in right.keys() - checked:
        if operator == "adam_step_first" and name == "logits":
            continue  # the sign of the gradient, which the moment has
        scaled = 1.1 * right[name].float()
        if name == "logits":
            scaled = x.logits[0] + 1.5 * (right[name] - x.logits[0])
        with pytest.raises(WrongResult):
            truth.check("entrgi", {**right, name: scaled})
    if "token" in right:
        worst = x.logits[0].float().argmin(dim=1)
        with pytest.raises(WrongResult, match="token"):
            truth.check("entrgi", {**right, "token": worst})


def test_floors_are_those_of_the_bindings():
    whole = Case("adam_iteration", 8, 5000, 64, "bfloat16", "bfloat16")
    parts = [Case(name, 8, 5000, 64, "bfloat16", "bfloat16") for name in ("sample_tokens", "relaxed_embedding")]
    parts.append(Case("adam_step_middle", 8, 5000, 64, "bfloat16", "bfloat16"))
    assert whole.floor() == tuple(map(sum, zip(*(part.floor() for part in parts), strict=True)))
    assert whole.floor()[1] == 2 * 2 * 8 * 5000 * 64


def test_the_quick_run_is_part_of_the_full_one():
    for kind in SELECTIONS:
        assert set(cases_of(QUICK[kind])) <= set(cases_of(SELECTIONS[kind]))
    assert {(case.N, case.logits) for case in cases_of(QUICK["cpu"])} >= {(16, "float32"), (1, "bfloat16")}


def test_the_whole_step_comes_first():
    for kind, shapes in (("cuda", 8 * 2 * 3 * 2), ("cpu", 3 * 2 * 2)):
        cases = cases_of(SELECTIONS[kind])
        assert [case.operator == "adam_iteration" for case in cases] == [True] * shapes + [False] * (
            len(cases) - shapes
        )


def test_inputs_in_turn_leave_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert timing.sets_beyond_cache(300, CPU) == 7
    assert timing.sets_beyond_cache(5000, CPU) == 1


def test_noise_is_the_difference_of_two_halves():
    times = timing.Times(([1.0, 1.2, 1.1], [1.3, 1.2, 1.25]))
    assert times.median == 1.2
    assert times.noise == pytest.approx((1.25 - 1.1) / 1.2)


class Device:
    """Stands in for CUDA: calls cost ``ms`` each, when they run or when a graph that holds them is replayed."""

    def __init__(self, monkeypatch, ms):
        self.now, self.ms, self.capturing, self.replays = 0.0, ms, None, 0
        device = self

        class Graph:
            def replay(self):
                device.now += device.ms * self.calls
                device.replays += 1

        class Capture:
            def __init__(self, graph, stream):
                self.graph, graph.calls = graph, 0

            def __enter__(self):
                device.capturing = self.graph

            def __exit__(self, *_exception):
                device.capturing = None

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                assert device.capturing is None

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")

    def call(self):
        if self.capturing is None:
            self.now += self.ms
        else:
            self.capturing.calls += 1


@pytest.mark.parametrize(("ms", "sets"), [(0.004, 7), (3.0, 1)])
@pytest.mark.parametrize("captured", [True, False])
def test_cuda_is_timed_by_replays_of_all_sets(monkeypatch, ms, sets, captured):
    device = Device(monkeypatch, ms)
    limits = timing.Limits(seconds=0.1, least=5, most=20)
    times = timing.measure({"a": [device.call] * sets}, {"a": captured}, torch.device("cuda"), limits)["a"]
    assert [len(half) for half in times.halves] == ([20, 20] if ms < 1 else [16, 16])
    assert times.median == pytest.approx(ms)
    assert (device.replays > 0) == captured
    assert (times.how == "graph") == captured


def test_what_cannot_be_captured_is_timed_by_events(monkeypatch):
    device = Device(monkeypatch, 1.0)

    def waits():
        if device.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.call()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = timing.measure({"a": [waits], "b": [device.call]}, {"a": True, "b": True}, torch.device("cuda"), FEW)
    assert {name: each.how for name, each in times.items()} == {"a": "events (no capture)", "b": "graph"}
    assert times["a"].median == times["b"].median == pytest.approx(1.0)


def test_a_failure_while_timing_leaves_the_others(monkeypatch):
    device = Device(monkeypatch, 1.0)

    def broken():
        raise RuntimeError("no kernel")

    for kind in ("cuda", "cpu"):
        calls = {"a": [broken], "b": [device.call]}
        times = timing.measure(calls, {"a": False, "b": True}, torch.device(kind), FEW)
        assert str(times["a"].failure) == "no kernel"
        assert times["b"].failure is None


def test_ratios_are_between_things_timed_alike():
    ours = {"median_ms": 1.0, "events_ms": 1.5}
    assert results.beside(ours, "graph") == results.beside(ours, "host") == 1.0
    assert results.beside(ours, "events") == results.beside(ours, "events (no capture)") == 1.5
    assert results.beside({"median_ms": 1.0}, "events") == 1.0


def test_a_call_that_takes_too_long_ends():
    with pytest.raises(TimeoutError), timing.time_limit(0.05):
        time.sleep(60)


def test_a_time_limit_is_one_whoever_wraps_it():
    """As torch.compile does with every exception, or as code does that swallows it."""

    def compiler():
        try:
            time.sleep(60)
        except TimeoutError as failure:
            raise RuntimeError("a backend failed") from failure

    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), timing.time_limit(0.05):
        compiler()
    with pytest.raises(TimeoutError), timing.time_limit(0.05), contextlib.suppress(TimeoutError):
        time.sleep(60)
    with pytest.raises(RuntimeError, match="another"), timing.time_limit(60):
        raise RuntimeError("another")


def test_calls_take_all_sets_in_turn():
    """What is timed must not find its inputs in a cache."""
    used = []
    calls = {"a": [lambda s=s: used.append(s) for s in range(3)]}
    times = timing.measure(calls, {"a": True}, CPU, timing.Limits(seconds=1e-9, least=7, most=7))
    assert used == [0, 0, 1, 2, 0, 1, 2, 0]  # the first one is the estimate
    assert len(times["a"].halves[0] + times["a"].halves[1]) == 7


def test_a_case_has_inputs_beyond_the_cache(monkeypatch):
    case = Case("logit_statistics", 2, 100, 0, "float32", "float32")
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2 * case.floor()[0])
    seen = {}

    def stub(calls, captured, device, limits):
        seen.update(calls)
        return {name: timing.Times(([1.0], [1.0])) for name in calls}

    monkeypatch.setattr(measure, "measure", stub)
    measure.measure_case(case, measure.Settings(CPU, compile="none"))
    assert {len(each) for each in seen.values()} == {4}
    assert len({call()["entropy"][0].item() for call in seen["entrgi"]}) == 4


# By name, seconds that ``measure`` is said to have found.
KNOWN = {"entrgi": 2.0, "published": 10.0, "composed": 5.0, "copy": 3.0, "embed": 1.0, "update": 4.0}


@pytest.fixture
def known_times(monkeypatch, small_machine):
    """``measure`` finds what it is told; what each entry copies or multiplies is kept."""
    bytes_copied = []

    def stub(calls, captured, device, limits):
        with TorchBytes(bytes_copied):
            calls["copy"][0]()
        return {name: timing.Times(([KNOWN[name]], [KNOWN[name]])) for name in calls}

    monkeypatch.setattr(measure, "measure", stub)
    return bytes_copied


class TorchBytes(TorchFunctionMode):
    """Bytes read and written by copies."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.Tensor.copy_:
            self.kept.append(sum(tensor.nbytes for tensor in arguments))
        return function(*arguments, **(keywords or {}))


def test_rows_are_what_was_measured(known_times, monkeypatch):
    case = Case("adam_iteration", 3, 2003, 24, "float32", "float32")
    peak = 5 * 2**20
    monkeypatch.setattr(timing.PeakMemory, "bytes", lambda self: peak)
    monkeypatch.setattr(measure, "PeakMemory", timing.PeakMemory)
    rows = {row["implementation"]: row for row in measure.measure_case(case, measure.Settings(CPU, compile="none"))}
    ours, work = rows["entrgi"], case.floor()[0]
    assert known_times == [pytest.approx(work, rel=1e-3)]  # the copy moves as many bytes
    assert (ours["copy_ms"], ours["gemm_ms"]) == (3.0, 5.0)
    draw, embed, update = (3.0 * part["bytes"] / work for part in case.floors())
    floor = draw + max(embed, 1.0) + max(update, 4.0)
    assert ours["floor_ms"] == pytest.approx(floor, rel=1e-3)
    assert ours["over_floor"] == pytest.approx(2.0 / floor, rel=1e-2)
    assert (ours["over_published"], ours["over_composed"]) == (5.0, 2.5)
    logits = 4 * 3 * 2003  # a copy of them is not the implementation's
    assert ours["peak_MiB"] == pytest.approx((peak - logits) / 2**20, abs=0.01)
    assert rows["composed"]["peak_MiB"] == ours["peak_MiB"]


@pytest.mark.parametrize("failure", [RuntimeError("no kernel"), torch.OutOfMemoryError("of 9 TB"), WrongResult("0")])
def test_a_baseline_that_fails_is_left_out(small_machine, monkeypatch, failure):
    """When it is built and checked, and as well when it is timed."""
    for fails_at in (0, 8):
        calls = []

        def call(calls=calls, fails_at=fails_at):
            calls.append(0)
            if len(calls) > fails_at:
                raise failure
            return {}

        broken = {"entrgi": registry()["greedy"]["entrgi"], "published": Implementation(lambda x, s: call)}
        monkeypatch.setattr(measure, "registry", lambda broken=broken: {"greedy": broken})
        case = Case("greedy", 2, 100, 0, "float32", "float32")
        ours, theirs = measure.measure_case(case, measure.Settings(CPU, compile="none"))
        assert ours["status"] == "measured"
        assert ours["median_ms"] > 0
        assert "over_published" not in ours
        expected = {"RuntimeError": "no kernel", "OutOfMemoryError": "out of memory", "WrongResult": "wrong result: 0"}
        assert theirs["status"] == expected[type(failure).__name__]
        assert "median_ms" not in theirs


def test_peak_memory_sees_what_is_allocated():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    memory, size = timing.PeakMemory(CPU), 100 * 2**20
    memory.start()
    torch.ones(size, dtype=torch.uint8)
    assert memory.bytes() == pytest.approx(size, rel=0.1)


def test_copies_that_stand_for_larger_ones_are_scaled(monkeypatch):
    monkeypatch.setattr(measure, "LARGEST_COPY", 1000)
    assert measure._Measurement._copy_scale(8000) == 4.0
    assert measure._Measurement._copy_scale(800) == 1.0


# ---- targets ---------------------------------------------------------------------------------------------------


def gpu_row(operator, implementation="entrgi", n=512, d=2048, **values):
    row = dict.fromkeys(results.COLUMNS)
    row |= {"operator": operator, "N": n, "V": 152_064, "d": d, "logits": "bfloat16", "embedding": "bfloat16"}
    row |= {"implementation": implementation, "kind": "cuda", "device": "NVIDIA H200 (sm 9.0)", "driver": "575.1"}
    return row | {"status": "measured", "threads": 16, "torch": "2.14.1", "noise": 0.01} | values


def verdict(row, *beside):
    judge([row, *beside])
    return row["met"]


@pytest.mark.parametrize(("ms", "met"), [(0.110, "met"), (0.112, "MISSED")])
def test_target_of_the_vocabulary_pass(ms, met):
    assert verdict(gpu_row("logit_statistics", d=0, median_ms=ms, copy_ms=0.1)) == met


def test_target_of_the_draw():
    statistics = gpu_row("logit_statistics", d=0, median_ms=0.1, copy_ms=0.1)
    assert verdict(gpu_row("sample_tokens", d=0, median_ms=0.134), statistics) == "met"
    assert verdict(gpu_row("sample_tokens", d=0, median_ms=0.136), statistics) == "MISSED"
    assert verdict(gpu_row("sample_tokens", d=0, median_ms=0.136)) == "open"


@pytest.mark.parametrize(
    ("n", "ms", "met"),
    [
        (512, 0.490, "met"),  # 0.319 TFLOP at 650 TFLOP/s: 0.4907 ms
        (512, 0.492, "MISSED"),
        (64, 0.117, "met"),  # the copy takes 0.1 ms
        (64, 0.118, "MISSED"),
        (256, 0.306, "met"),  # 1.25 times 0.2453 ms
        (256, 0.308, "MISSED"),
    ],
)
def test_target_of_the_relaxed_embedding(n, ms, met):
    assert verdict(gpu_row("relaxed_embedding", n=n, median_ms=ms, copy_ms=0.1)) == met


def test_the_two_pass_embedding_must_be_slower():
    row = gpu_row("relaxed_embedding", n=64, median_ms=0.110, copy_ms=0.1)
    assert verdict(row, gpu_row("relaxed_embedding", "two-pass", n=64, median_ms=0.105)) == "met; MISSED"


def test_rates_of_one_class_of_chips_are_asked_of_no_other():
    row = gpu_row("relaxed_embedding", median_ms=99.0, copy_ms=0.1, device="NVIDIA A100 (sm 8.0)")
    assert verdict(row) == ""
    assert verdict(gpu_row("adam_step_middle", median_ms=99.0, copy_ms=0.1, embedding="float32")) == ""


def test_target_of_the_update():
    # 0.319 TFLOP at 700 TFLOP/s are 0.4556 ms: beside 0.51 ms of bytes 35 %, beside 0.1 ms 15 %.
    assert verdict(gpu_row("adam_step_middle", median_ms=0.688, copy_ms=0.51)) == "met"
    assert verdict(gpu_row("adam_step_middle", median_ms=0.689, copy_ms=0.51)) == "MISSED"
    assert verdict(gpu_row("adam_step_middle", median_ms=0.523, copy_ms=0.1)) == "met"
    assert verdict(gpu_row("adam_step_middle", median_ms=0.525, copy_ms=0.1)) == "MISSED"


def whole_step(ms, peak=600.0, published=10.0, compiled=4.0, composed=2.0):
    row = gpu_row("adam_iteration", n=512, median_ms=ms, gemm_ms=0.9, floor_ms=1.0, peak_MiB=peak)
    others = {"published": published, "compiled": compiled, "composed": composed}
    return row, *(gpu_row("adam_iteration", name, median_ms=value) for name, value in others.items())


def test_targets_of_the_whole_step():
    assert verdict(*whole_step(1.2)) == "met; met; met; met"
    assert verdict(*whole_step(1.26)) == "MISSED; met; met; met"
    # 0.9 ms of products are more than a third of 2.5 ms: then 1.3 times the floor.
    assert verdict(*whole_step(1.2, compiled=2.5)) == "met; met; met; met"
    assert verdict(*whole_step(1.31, compiled=2.5, published=16.0)) == "met; MISSED; met; met"
    assert verdict(*whole_step(1.2, composed=1.1)) == "met; met; MISSED; met"
    assert verdict(*whole_step(1.2, peak=1000.0)) == "met; met; met; MISSED"
    ours, *others = whole_step(1.2, peak=650.0)  # 594 MiB of moments, 8 of embeddings, 2 of slack: 46 more
    assert verdict(ours | {"workspace_MiB": 40.0}, *others) == "met; met; met; MISSED"
    assert verdict(ours | {"workspace_MiB": 47.0}, *others) == "met; met; met; met"


def test_the_workspace_is_that_of_the_part_with_most():
    case = Case("adam_iteration", 8, 152_064, 2048, "bfloat16", "bfloat16")
    parts = ("sample_tokens", "relaxed_embedding", "adam_step_middle")
    each = [Case(name, 8, 152_064, 2048, "bfloat16", "bfloat16").workspace() for name in parts]
    assert case.workspace() == max(each) > 0


# ---- regressions -----------------------------------------------------------------------------------------------


def measured(ms, noise=0.01, **baselines):
    """A case with its floor at 1 ms."""
    row = dict.fromkeys(results.COLUMNS)
    row |= {"operator": "greedy", "N": 4, "V": 10, "d": 0, "logits": "float32", "embedding": "float32"}
    row |= {"noise": noise, "floor_ms": 1.0}
    each = {"entrgi": ms, "published": 8.0, "composed": 4.0, **baselines}
    return [{**row, "implementation": name, "median_ms": value} for name, value in each.items()]


def faster(rows, times):
    return [{**row, "median_ms": row["median_ms"] / times, "floor_ms": row["floor_ms"] / times} for row in rows]


def test_a_regression_is_found():
    (comparison,) = bench_check.compare(measured(2.0), measured(2.5))
    assert comparison.regressed
    assert comparison.change == pytest.approx(0.25)
    assert comparison.growth == pytest.approx({"floor": 1.25, "published": 1.25, "composed": 1.25})


def test_another_machine_is_no_regression():
    for times in (0.3, 5.0):
        (comparison,) = bench_check.compare(measured(2.0), faster(measured(2.0), times))
        assert comparison.change == pytest.approx(0.0)
        (comparison,) = bench_check.compare(measured(2.0), faster(measured(2.5), times))
        assert comparison.regressed


def test_a_faster_baseline_is_no_regression():
    (comparison,) = bench_check.compare(measured(2.0), measured(2.0, published=4.0))
    assert not comparison.regressed
    assert comparison.growth["published"] == pytest.approx(2.0)


def test_tolerance_follows_the_noise():
    assert not bench_check.compare(measured(2.0), measured(2.1))[0].regressed
    (noisy,) = bench_check.compare(measured(2.0, noise=0.04), measured(2.4, noise=0.04))
    assert noisy.tolerance == pytest.approx(0.24)
    assert not noisy.regressed
    assert not noisy.too_noisy


def test_one_noisy_baseline_hides_no_regression():
    before, now = measured(2.0, other=6.0), measured(2.5, other=6.0)
    for rows in (before, now):
        rows[-1]["noise"] = 1.73
    (comparison,) = bench_check.compare(before, now)
    assert comparison.tolerance == pytest.approx(0.1)
    assert comparison.regressed


def test_too_much_noise_is_said():
    (comparison,) = bench_check.compare(measured(2.0, noise=0.1), measured(2.5, noise=0.1))
    assert comparison.tolerance == 0.3
    assert comparison.too_noisy
    assert not comparison.regressed
    (comparison,) = bench_check.compare(measured(2.0, noise=0.1), measured(2.7, noise=0.1))
    assert comparison.regressed


def test_only_what_both_have_is_compared():
    other = [{**row, "N": 5} for row in measured(9.0)]
    assert bench_check.compare(measured(2.0), other) == []
    (comparison,) = bench_check.compare(measured(2.0), [*other, *measured(2.0)[:2]])
    assert set(comparison.growth) == {"floor", "published"}


def test_exit_status_of_the_check(tmp_path, monkeypatch, capsys):
    about = {"kind": "cpu", "device": "one", "threads": 1, "torch": "2"}
    committed = tmp_path / "committed"
    results.write(committed, [{**row, **about} for row in measured(2.0)])

    def quick(ms, noise=0.01, n=4):
        def main(arguments):
            assert "--quick" in arguments
            output = Path(arguments[arguments.index("--output") + 1])
            rows = faster(measured(ms, noise), 3.0)
            results.write(output, [{**row, **about, "device": "two", "N": n} for row in rows])
            return 0

        return main

    monkeypatch.setattr(operators, "main", quick(2.05))
    assert bench_check.main(["--device", "cpu", "--committed", str(committed)]) == 0
    monkeypatch.setattr(operators, "main", quick(2.6))
    assert bench_check.main(["--device", "cpu", "--committed", str(committed)]) == 1
    printed = capsys.readouterr().out
    assert "REGRESSED" in printed
    assert "another device: one then, two now" in printed
    assert bench_check.main(["--device", "cpu", "--committed", str(tmp_path / "none")]) == 2
    for unclear in (quick(2.0, noise=0.2), quick(2.0, n=5)):
        monkeypatch.setattr(operators, "main", unclear)
        assert bench_check.main(["--device", "cpu", "--committed", str(committed)]) == 2


def test_the_check_passes_other_options_on(tmp_path, monkeypatch):
    """``--commit`` is no abbreviation of ``--committed``."""
    given = []
    results.write(tmp_path / "committed", measured(2.0))
    monkeypatch.setattr(operators, "main", lambda arguments: given.extend(arguments) or 9)
    assert bench_check.main(["--device", "cpu", "--committed", str(tmp_path / "committed"), "--commit", "abc"]) == 9
    assert given[-2:] == ["--commit", "abc"]


# ---- the README ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    cpu = {"kind": "cpu", "device": "AMD EPYC, AVX512", "driver": None}
    rows = []
    for name, ms, peak in (("entrgi", 340.0, 89.0), ("composed", 1090.0, 427.0), ("published", 1376.0, 437.0)):
        rows.append(gpu_row("adam_iteration", name, n=64, d=1024, median_ms=ms, gemm_ms=432.0, peak_MiB=peak, **cpu))
    rows[0]["over_published"] = 4.05
    results.write(tmp_path / "operators_cpu", rows)
    return tmp_path


def test_readme_block(folder):
    readme = folder / "README.md"
    readme.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    report.rewrite(readme, folder)
    text = readme.read_text()
    assert text.startswith(f"head\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\ntail\n")
    assert "old" not in text
    line = "| 152,064 | 1024 | bf16 | 64 | 340 ms | 432 ms | 1090 ms |  | 1376 ms | **4.0x** | 89 / 427 / 437 (74) |"
    assert line in text
    assert "No figure for a GPU exists yet." in text

    whole, *others = whole_step(1.2)
    judge([whole, *others])
    whole["over_published"] = 8.3
    results.write(folder / "operators_nvidia_h200", [whole, *others])
    report.rewrite(readme, folder)
    text = readme.read_text()
    assert "No figure for a GPU" not in text
    assert "NVIDIA H200 (sm 9.0), driver 575.1, torch 2.14.1" in text
    assert "Targets met: adam_iteration 4 of 4." in text
    assert ", commits" not in text
    report.rewrite(readme, folder)
    assert readme.read_text() == text


def test_a_table_without_results_is_kept(folder):
    readme = folder / "README.md"
    readme.write_text(report.README.read_text())
    report.rewrite(readme, folder)
    text = readme.read_text()
    (folder / "operators_cpu.csv").unlink()
    assert report.rewrite(readme, folder) == ["operators_cpu"]
    assert readme.read_text() == text
    results.write(folder / "operators_nvidia_h200", list(whole_step(1.2)))
    assert report.rewrite(readme, folder) == ["operators_cpu"]
    both = readme.read_text()
    assert both.count("AMD EPYC, AVX512, threads") == both.count("NVIDIA H200 (sm 9.0)") == 1
    (folder / "operators_nvidia_h200.csv").unlink()
    assert report.rewrite(readme, folder) == ["operators_cpu", "operators_nvidia_h200"]
    assert readme.read_text() == both


def test_the_heading_names_all_that_its_rows_ran_with(folder):
    rows = results.read(folder / "operators_cpu")
    rows[0] |= {"commit": "abc"}
    rows[1] |= {"commit": "abd", "torch": "3.0"}
    results.write(folder / "operators_cpu", rows)
    heading = report.section(folder).split("\n")[0]
    assert "torch 2.14.1, 3.0, commits abc, abd" in heading


def test_open_targets_are_not_met_ones():
    row, *_ = whole_step(1.2)
    judge([row])
    assert report.summary([row]) == "Targets met: adam_iteration 1 of 3, 2 open."


@pytest.mark.parametrize(
    "text", ["", f"{report.BEGIN}", f"{report.END} {report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"]
)
def test_readme_without_markers(folder, text):
    readme = folder / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        report.rewrite(readme, folder)
    assert readme.read_text() == text


def test_the_readme_has_its_markers():
    text = report.README.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1


def test_files_are_named_after_the_device():
    assert results.path_for(None).name == "operators_cpu"
    assert results.path_for("NVIDIA H200").name == "operators_nvidia_h200"
