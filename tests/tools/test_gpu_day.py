"""The parent of ``tools/gpu_day.py``, with children whose answers are made up: no GPU, no simulator, no torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
from gpu_day import build, command, machine, pack, phases, records, shapes, tools  # noqa: E402
from gpu_day.day import Day  # noqa: E402
from gpu_day.table import table  # noqa: E402

SCRIPT = [sys.executable, str(ROOT / "tools" / "gpu_day.py"), "run", "--dry-run", "--stub"]


def dry_run(output, *options):
    run = subprocess.run([*SCRIPT, "--output", str(output), *options], capture_output=True, text=True, timeout=100)
    return run, records.read(output / "records.jsonl")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def planted(out):
    return dry_run(out)


@pytest.fixture
def day(tmp_path):
    """A whole day or, by its arguments, a part of one, with stubs as children."""

    def make(deadline=100.0, only=(), planted=None, kind=machine.Machine, seconds=3.0, libraries=build.CARRIED):
        box, _ = machine.dry(tmp_path / "scratch", planted or {}, stub=True)
        box = kind(box.kind, tmp_path, tmp_path, seconds=dict.fromkeys(box.seconds, seconds), planted=box.planted)
        out = records.Records(tmp_path / "out")
        clock = phases.Clock(deadline, phases.chosen(100.0 if only else deadline, only), out.start)
        return Day(box, shapes.small(), clock, out, lambda: FakeBuild(libraries, tmp_path / "no log"))

    return make


class FakeBuild:
    process, why = None, ""

    def __init__(self, libraries, log):
        self.libraries, self.log = libraries, log

    def wait(self, _limit):
        return self.libraries


def ends(day):
    return [each for each in records.outcomes(records.read(day.out.path)) if each["phase"] not in ("facts", "build")]


# ---- what goes wrong costs its own case ------------------------------------------------------------------------


def test_exactly_what_was_planted_is_marked(planted):
    run, lines = planted
    assert run.returncode == 0, run.stderr
    status = {(each["phase"], each["case"]): each for each in records.outcomes(lines)}
    troubles = {key: each["status"] for key, each in status.items() if each["status"] not in ("right", "skipped")}
    assert troubles == {
        ("build", "libraries"): "failed",
        ("smoke", "relaxed_embedding: embed_a 0"): "hang",
        ("smoke", "adam_step_middle: update_a 0"): "wrong",
    }
    assert status["build", "libraries"]["source"] == build.CARRIED
    skipped = [each for each in status.values() if each["status"] == "skipped" and each["phase"] != "facts"]
    for each in skipped:
        assert re.match(r"hang in smoke|wrong in smoke: adam_step_middle: update_a 0|.* is not here", each["why"]), each
    # Their benches, and nobody else's.
    timed = {key[1]: each["status"] for key, each in status.items() if key[0] == "bench"}
    for case, outcome in timed.items():
        bad = case.startswith(("relaxed_embedding", "adam_step_middle"))
        assert outcome == ("skipped" if bad else "right"), case
    assert {phase["phase"] for phase in lines if phase["event"] == "phase"} == {phase.name for phase in phases.PHASES}
    launches = status["ncu", "counters"]["launches"]
    assert launches == [{"kernel": "a stand-in", "gpu__time_duration.sum": "1"}]
    assert status["sanitize", "memcheck: findings"]["status"] == "right"
    assert status["sanitize", "synccheck: relaxed_embedding: embed_b 1"]["status"] == "right"
    assert status["end-to-end", "smoke: entrgi"]["seconds_per_step"] == 0.1


def test_the_table_is_the_last_output_and_comes_home(planted, out):
    run, lines = planted
    assert run.stdout.strip().endswith(table(lines))
    assert len(table(lines)) < 11_000
    assert "HANG smoke: relaxed_embedding: embed_a 0" in run.stdout
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) <= 8
    assert all(file.parent == out and file.stat().st_size < 16 << 20 for file in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: {**r, "status": "right"} if r.get("status") == "hang" else r, "no case of smoke is hang"),
        (lambda r: {**r, "status": "right"} if r.get("status") == "wrong" else r, "no case of smoke is wrong"),
        (lambda r: {**r, "status": "wrong"} if r.get("case") == "logit_statistics N=6" else r, "bench: logit_stat"),
        (lambda r: {**r, "why": "elsewhere"} if r.get("status") == "skipped" else r, "skipped: elsewhere"),
        (lambda r: {**r, "event": "stop"} if r.get("case") == "copy" else r, "stop:"),
    ],
)
def test_a_dry_run_notices_what_was_not_planted(planted, change, complaint):
    assert command.surprises(planted[1]) == []
    assert any(complaint in line for line in command.surprises([change(record) for record in planted[1]]))


def test_without_any_library_the_ceilings_are_measured(tmp_path):
    (tmp_path / "empty").mkdir()
    run, lines = dry_run(tmp_path / "out", "--pack", str(tmp_path / "empty"))
    assert run.returncode == 1
    assert "no libraries were brought along" in run.stdout
    found = records.outcomes(lines)
    assert {each["status"] for each in found if each["phase"] == "ceilings"} == {"right"}
    later = [each for each in found if each["phase"] not in ("facts", "ceilings", "build")]
    assert {(each["status"], each["why"]) for each in later} == {("skipped", "the package's libraries are missing")}


def test_a_second_hang_of_a_kernel_leaves_out_all_of_it(day):
    one = day(only=("smoke",), seconds=1.5)
    one.avoid = [{"kernel": "embed_a", "block_m": 128, "why": "hang in smoke"}]
    one.box.planted["relaxed_embedding"] = "hang"
    one.run()
    assert {"kernel": "embed_a", "why": "hang in smoke"} in one.avoid
    later = [each for each in ends(one) if each["case"].startswith("relaxed_embedding: embed_a")]
    assert [each["status"] for each in later] == ["hang", "skipped", "skipped"]


def test_a_wrong_case_leaves_out_its_own_operator_and_plan_only(day):
    one = day(only=("smoke",), planted={"adam_step_middle": "wrong"})
    one.run()
    entry = one.avoid[0]
    assert entry["kernel"] == "update_a"
    assert entry["block_m"] == 64
    assert entry["why"] == "wrong in smoke: adam_step_middle: update_a 0"


class Dead(machine.Machine):
    """A device that does not answer any more."""

    def probe(self, target, what):
        return [sys.executable, "-c", "raise SystemExit(3)"] if what == "alive" else super().probe(target, what)


def test_a_dead_device_ends_the_run_and_keeps_what_is_written(day):
    one = day(only=("smoke", "bench"), planted={"relaxed_embedding": "hang"}, kind=Dead, seconds=1.5)
    one.run()
    lines = records.read(one.out.path)
    assert lines[-1]["event"] == "stop"
    assert "cannot use the device" in lines[-1]["why"]
    last = ends(one)[-1]
    assert (last["phase"], last["status"]) == ("smoke", "hang")
    assert "STOPPED in smoke" in table(lines)
    assert one.children == {}


def test_a_fault_of_a_phase_does_not_end_the_day(day):
    one = day(only=("smoke", "bench"))
    one.smoke = lambda: 1 / 0
    one.run()
    error = next(record for record in records.read(one.out.path) if record["event"] == "error")
    assert "ZeroDivisionError" in error["why"]
    assert {each["status"] for each in ends(one) if each["phase"] == "bench"} == {"right"}
    assert "ERROR in smoke: ZeroDivisionError" in table(records.read(one.out.path))


def test_a_slow_baseline_is_no_hang_of_ours(day):
    """Once a case's own launches are over, its child waits for PyTorch."""
    for launching, status in ((False, "failed"), (True, "hang")):
        one = day(only=("bench",), seconds=1.5)
        child = one.child("bench")
        child.ready, child.launching, child.plans = True, launching, [{"kernel": "embed_a"}]
        answer = one._expired("bench", child, 0.4, "")
        assert answer["status"] == status
        assert bool(one.avoid) == launching
        assert child.process.poll() is not None


def test_an_error_of_the_device_costs_the_process_and_its_plan(day):
    one = day(only=("smoke",))
    one.phase = one.clock.phases[-1]
    child = one.child("smoke/all")
    child.ask = lambda request, seconds: (
        setattr(child, "plans", [{"kernel": "x"}]),
        {"status": "failed", "why": "RuntimeError: CUDA error: an illegal memory access"},
    )[1]
    one.case("broken", "smoke/all", {"do": "check"})
    assert one.avoid[0]["kernel"] == "x"
    assert "smoke/all" not in one.children
    assert records.read(one.out.path)[-1]["event"] == "alive"
    assert child.process.poll() is not None


# ---- the clock -------------------------------------------------------------------------------------------------


def test_a_whole_day_has_every_phase_and_five_minutes_have_the_first():
    assert [phase.name for phase in phases.chosen(590)] == [p.name for p in phases.PHASES if not p.alone]
    assert [phase.name for phase in phases.chosen(300)] == ["facts", "ceilings", "build", "smoke", "bench", "ncu"]
    assert [phase.name for phase in phases.chosen(235, ("end-to-end",))] == ["facts", "build", "end-to-end"]
    assert [phase.name for phase in phases.chosen(585)] == [phase.name for phase in phases.chosen(590)]


def test_a_phase_gets_what_earlier_ones_left_and_a_late_one_takes_from_less_important_ones():
    chosen = phases.chosen(590)
    by_name = {phase.name: phase for phase in chosen}
    planned = 0.0
    now = time.monotonic()
    for phase in chosen:
        planned += phase.seconds
        early = phases.Clock(590, chosen, now).limit(phase) - now
        assert early == pytest.approx(584 if phase is chosen[-1] else planned, abs=0.1)
    # 330 s late: the tests keep their hands off the benches and the whole step, which are more important.
    late = phases.Clock(590, chosen, now - 330)
    assert late.limit(by_name["tests"]) - now == pytest.approx(254 - 120 - 55, abs=0.1)
    assert late.limit(by_name["bench"]) - now == pytest.approx(120, abs=0.1)


def test_the_end_of_the_time_is_no_hang(day):
    """The deadline comes while a child does not answer: stopped, and the table is still made."""
    one = day(deadline=phases.REPORT_SECONDS + 8, only=("smoke",), planted={"relaxed_embedding": "hang"}, seconds=100)
    start = time.monotonic()
    one.run()
    assert time.monotonic() - start < 14
    cut = next(each for each in ends(one) if each["case"] == "relaxed_embedding: embed_a 0")
    assert cut["status"] == "stopped"
    assert one.avoid == []


@pytest.mark.parametrize("deadline", ["19", "1e9", "x"])
def test_a_deadline_out_of_range_is_refused(deadline, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--deadline", deadline, "--output", str(tmp_path)])
    assert "--deadline" in capsys.readouterr().err


# ---- records ---------------------------------------------------------------------------------------------------


def hanging_run(tmp_path):
    """A dry run that is in the middle of its hang; it leads its own process group."""
    process = subprocess.Popen(
        [*SCRIPT, "--output", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(600):
        if (tmp_path / "records.jsonl").exists():
            lines = records.read(tmp_path / "records.jsonl")
            if lines and lines[-1].get("case") == "relaxed_embedding: embed_a 0":
                return process
        time.sleep(0.05)
    raise AssertionError("the hang was not reached")


def test_what_was_begun_is_on_disk_when_the_parent_is_killed(tmp_path):
    process = hanging_run(tmp_path)
    process.kill()
    process.wait()
    last = records.outcomes(records.read(tmp_path / "records.jsonl"))[-1]
    assert (last["case"], last["status"]) == ("relaxed_embedding: embed_a 0", "stopped")


def test_a_terminated_run_prints_its_table(tmp_path):
    process = hanging_run(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert "STOPPED in smoke: interrupted" in output
    assert (tmp_path / "table.txt").exists()


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    out = records.Records(tmp_path)
    out.write("begin", phase="smoke", case="a")
    out.write("end", phase="smoke", case="a", status="right")
    with out.path.open("a") as file:
        file.write('{"event": "end", "phase": "smo')
    assert [each["status"] for each in records.outcomes(records.read(out.path))] == ["right"]


def test_a_log_comes_home_within_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST_FILE", 5 * records.TAIL)
    out, log = records.Records(tmp_path / "out"), tmp_path / "log"
    log.write_bytes(b"x" * 3 * records.TAIL + b"the end")
    for _ in range(20):
        out.keep(log, "children.log", "a child")
    kept = (tmp_path / "out" / "children.log").read_bytes()
    assert len(kept) <= 5 * records.TAIL
    assert kept.endswith(b"the end")


# ---- libraries -------------------------------------------------------------------------------------------------


@pytest.fixture
def building(tmp_path):
    """A Build whose libraries load where a file is in its target."""

    def make(program, sources=None, carried=True):
        pack, target = tmp_path / "pack", tmp_path / "target"
        pack.mkdir(exist_ok=True)
        target.mkdir(exist_ok=True)
        package = target / "entrgi_ext"
        if carried:
            source = tmp_path / "carried" / "entrgi_ext"
            source.mkdir(parents=True)
            (source / "__init__.py").write_text("def loaded_libraries():\n    return {'cuda': None}\n")
            (source / "_bindings.py").write_text("launch = True\n")
            command_ = ["tar", "-C", str(source.parent), "-cJf", str(pack / "libraries.tar.xz"), "entrgi_ext"]
            subprocess.run(command_, check=True)
            shutil.rmtree(source)
            (pack / "manifest.json").write_text(json.dumps({"sources": sources or build.source_hash()}))
        program = program.replace("TARGET", repr(str(package)))
        environment = {**os.environ, "PYTHONPATH": str(target)}
        return build.Build(pack, tmp_path, target, environment, [sys.executable, "-c", program])

    return make


COMPILES = """
import pathlib
package = pathlib.Path(TARGET)
package.mkdir()
(package / "__init__.py").write_text("def loaded_libraries():\\n    return {'cuda': None}\\n")
(package / "_bindings.py").write_text("launch = True\\n")
"""


def test_a_build_that_works_is_not_repeated(building):
    one = building(COMPILES, carried=False)
    assert one.wait(time.monotonic() + 30) == build.BUILT
    assert building("raise SystemExit(1)", carried=False).wait(time.monotonic()) == build.FOUND


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit(2)", "the build ended with status 2"),
        ("import time; time.sleep(100)", "did not finish within"),
        (COMPILES.replace("launch = True", "import nothing_there"), "No module named 'nothing_there'"),
        (COMPILES.replace("'cuda': None", "'cuda': 'no libcudart'"), "no libcudart"),
        (COMPILES.replace("launch = True", "pass"), "hold no launchers"),
    ],
)
def test_what_was_brought_along_takes_the_place_of_a_build(building, program, why):
    one = building(program)
    assert one.wait(time.monotonic() + (0.3 if "sleep" in program else 30)) == build.CARRIED
    assert why in one.why
    assert one.process.poll() is not None
    assert not one.stamp.exists()


def test_libraries_of_other_sources_are_refused(building):
    one = building("raise SystemExit(2)", sources="other")
    assert one.wait(time.monotonic() + 30) == build.NONE
    assert "are of other sources (other, here" in one.why


# ---- programs --------------------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 1
==PROF== Disconnected
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","us","%"
"0","1","void entrgi::relaxed_embedding_sm90_kernel<1>(X)","400.1","88.2"
"1","1","void entrgi::vocab_pass_sm90_kernel<2>(X)","12.5","70"
"""


def test_counters_of_every_launch():
    first, second = tools.counters(NCU)
    assert first["kernel"].startswith("void entrgi::relaxed_embedding_sm90_kernel")
    assert first["gpu__time_duration.sum"] == "400.1"
    assert second["dram__throughput.avg.pct_of_peak_sustained_elapsed"] == "70"
    assert tools.counters("==ERROR== Failed to find metric") == []


def test_test_files_of_a_kernel_that_hung_are_left_out(tmp_path):
    (_, everything), _ = tools.selections(machine.gpu(tmp_path), set())
    (_, left), _ = tools.selections(machine.gpu(tmp_path), {"logit_update_sm90"})
    gone = set(everything) - set(left)
    assert gone
    assert all("test_kernel_logit_update" in file for file in gone)
    assert any("test_kernel_relaxed_embedding" in file for file in left)


def test_a_program_is_ended_with_all_that_it_started(tmp_path):
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run = tools.run([sys.executable, "-c", program], 0.5)
    assert run.status is None
    assert "ended after" in run.why
    time.sleep(2.2)
    assert not (tmp_path / "alive").exists()


# ---- what travels ----------------------------------------------------------------------------------------------


def test_libraries_older_than_the_sources_do_not_travel(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    library, source = tmp_path / "entrgi_ext" / "libentrgi_cpu.so", tmp_path / "csrc" / "a.cpp"
    for file in (library, source):
        file.parent.mkdir()
    with pytest.raises(pack.Unusable, match=r"entrgi_ext/libentrgi_cpu.so is missing"):
        pack._current(library)
    library.touch()
    source.touch()
    os.utime(source, (1e9, 1e9))
    assert pack._current(library) == library
    os.utime(library, (9e8, 9e8))
    with pytest.raises(pack.Unusable, match=r"csrc/a.cpp is newer than libentrgi_cpu.so"):
        pack._current(library)


def test_a_folder_that_is_too_large_or_not_whole_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "pack"
    (folder / "wheels").mkdir(parents=True)
    for name in ("libraries", "cutlass"):
        pack.archive(folder / f"{name}.tar.xz", [])
    with pytest.raises(pack.Unusable, match=r"cute/tensor.hpp is not among CUTLASS's headers"):
        pack.check(folder)
    (folder / "more").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(pack, "MOST_BYTES", 2 << 20)
    with pytest.raises(pack.Unusable, match=r"3.0 MiB, at most 2"):
        pack.check(folder)


def test_wheels_that_are_there_already_are_not_unpacked(tmp_path):
    (tmp_path / "wheels").mkdir()
    for name in ("pytest", "nothing_of_this_name"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{name}-1.dist-info/METADATA", "")
    site = tmp_path / "site"
    assert build.install_wheels(tmp_path, site) == ["nothing_of_this_name-1-py3-none-any.whl"]
    assert [file.name for file in site.iterdir() if file.suffix != ".dist-info"] == ["nothing_of_this_name"]


def test_the_first_answer_of_a_process_has_twice_the_time(day):
    """The driver is initialised and code is loaded in it: that is no hang."""
    one = day(only=("bench",), seconds=3.0)
    one.phase, given = one.clock.phases[-1], []
    child = one.child("bench")
    ask = child.ask
    child.ask = lambda request, seconds: given.append(seconds) or ask(request, seconds)
    for name in ("a", "b"):
        one.case(name, "bench", {"do": "device"})
    assert given == [6.0, 3.0]
    one.drop_all()
