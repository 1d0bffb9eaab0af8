"""What holds for every command: arguments, prompts, numbers, files and terminals as people have them."""

import json
import os
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import entrgi
import entrgi.trace.plot
from entrgi import cli, memory, trace
from entrgi.cli import display
from entrgi.cli import models as models_of_commands
from entrgi.cli.console import signals_interrupt
from entrgi.cli.options import SAMPLER
from support import checkpoints, tiny, traces

PROMPTS = ["the movie", "w1 w2 w3", "w4", "the plot was w5", "w6 w7"]


def invoke(*arguments: str, code: int = 0, **options: object):
    result = CliRunner(**options.pop("runner", {})).invoke(cli.app, list(map(str, arguments)), **options)
    assert result.exit_code == code, result.output
    return result


def error_line(*arguments: str, code: int = 2, **options: object) -> str:
    """The one line that a command ends with."""
    result = invoke(*arguments, code=code, **options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "denoiser": checkpoints.denoiser(root / "denoiser"),
        "chat": checkpoints.denoiser(root / "chat", chat=tiny.CHAT),
        "reward": checkpoints.reward(root / "reward"),
    }


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch):
    """The same on every machine; what is really free otherwise."""
    plain = memory.available
    monkeypatch.setattr(memory, "available", lambda _device=None: 64 * 10**9)
    return plain


@pytest.fixture
def quick(folders) -> list[str]:
    pair = ["--model", folders["denoiser"], "--reward", folders["reward"]]
    return ["sample", *pair, "-k", "2", "-l", "4", "-m", "1", "--seed", "5"]


@pytest.fixture
def several(quick) -> list[str]:
    return [*quick, *(part for prompt in PROMPTS for part in ("-p", prompt))]


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong is found before a model is loaded."""

    def load(_self: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(models_of_commands.Models, "load", load)


@pytest.fixture
def one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is a batch."""
    monkeypatch.setattr(memory, "ENOUGH_ROWS", 1)


# --- results last -------------------------------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, object]:
    """Options that write every kind of file, and a check that all are whole."""
    names = {"--trace": "t.jsonl", "--plot": "p.png", "--output": "o.jsonl", "--json": "j.json"}
    arguments = [part for option, name in names.items() for part in (option, str(folder / name))]

    def check(complete: bool = True, prompts: int = 1, finished: int | None = None) -> None:
        (run,) = trace.read(folder / "t.jsonl").runs
        assert run.complete is complete
        assert (folder / "p.png").stat().st_size > 5000
        lines = (folder / "o.jsonl").read_text().splitlines() if (folder / "o.jsonl").exists() else []
        assert len(list(map(json.loads, lines))) == (prompts if finished is None else finished)
        assert len(json.loads((folder / "j.json").read_text())["runs"]["entrgi"]["results"]) == prompts
        left = {path.name for path in folder.iterdir()}
        assert left - {"o.jsonl"} == set(names.values()) - {"o.jsonl"}

    return {"arguments": arguments, "check": check}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "ordinal not in range(128)"), 2),
        (BrokenPipeError(32, "Broken pipe"), 141),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("the terminal is gone"), 1),
    ],
    ids=lambda each: type(each).__name__,
)
def test_files_are_written_before_anything_is_shown(quick, tmp_path, monkeypatch, error, code) -> None:
    def broken(*_args: object) -> None:
        raise error

    monkeypatch.setattr(display, "report", broken)
    files = kept(tmp_path)
    result = invoke(*quick, "-p", "the movie", *files["arguments"], code=code)
    files["check"]()
    assert "Traceback" not in result.output
    if code == 141:
        assert "error" not in result.stderr


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp1252", "cp437", "shift_jis", "utf-8"])
@pytest.mark.parametrize("form", ["table", "json"])
def test_every_encoding_shows_every_text(quick, tmp_path, charset, form) -> None:
    prompt = "caf\u00e9 \U0001f600 \u4f60"
    files = ["--trace", tmp_path / "t.jsonl", *(["--json"] if form == "json" else [])]
    result = invoke(*quick, "-p", prompt, *files, runner={"charset": charset})
    assert trace.read(tmp_path / "t.jsonl").prompts[0].prompt == prompt
    if form == "json":
        assert json.loads(result.stdout)["runs"]["entrgi"]["results"][0]["prompt"] == prompt
    elif charset != "utf-8":
        assert "\\U0001f600" in result.stdout


@pytest.mark.grid(strength=1)
@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("target", ["pipe", "full"])
def test_processes_whose_output_goes_nowhere(tmp_path, arguments, target) -> None:
    """The real thing: a reader that has left, a disk that is full."""
    file = tmp_path / "t.jsonl"
    command = [sys.executable, "-m", "entrgi", "sample", "-k", "1", "-l", "2", "-t", "2", "-m", "1", *arguments]
    read, write = os.pipe()
    os.close(read)
    if target == "full":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as anywhere else
    process = subprocess.Popen(
        [*command, "--trace", file], stdout=write, stderr=subprocess.PIPE, text=True, env=buffered
    )
    os.close(write)
    _, errors = process.communicate(timeout=500)
    assert trace.read(file).runs[0].complete
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    if target == "pipe":
        assert process.returncode == 141
        assert "rror" not in errors
    else:
        assert process.returncode == 1
        assert errors.count("error: ") == 1


def test_closed_standard_output_is_no_error(quick, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    cli.app([*quick, "-p", "the", "--trace", str(tmp_path / "t.jsonl")], standalone_mode=False)
    assert trace.read(tmp_path / "t.jsonl").runs[0].complete


def test_a_closed_standard_error_stops_nothing(tmp_path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "entrgi", "sample", "-k", "1", "-l", "2", "-t", "2", "-m", "1"]
    options = {"stdout": subprocess.PIPE, "stderr": write, "text": True, "env": {**os.environ, "FORCE_COLOR": "1"}}
    process = subprocess.Popen([*command, "--trace", tmp_path / "t.jsonl"], **options)
    os.close(write)
    shown, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert "The movie was" in shown
    assert trace.read(tmp_path / "t.jsonl").runs[0].complete


# --- errors keep what is done ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("the device is gone"), 1),
        (ValueError("the reward is wrong"), 2),
        (MemoryError(), 1),
        (OSError(5, "Input/output error"), 1),
        (KeyboardInterrupt(), 130),
        (KeyError("a bug"), 1),
    ],
    ids=lambda each: type(each).__name__,
)
def test_errors_in_the_middle_keep_the_partial_output(quick, tmp_path, monkeypatch, error, code) -> None:
    states = []

    class Progress:
        def __enter__(self):
            return lambda _name, _steps: self.on_step

        def __exit__(self, *_rest):
            return None

        def on_step(self, state):
            states.append(state)
            if len(states) == 2:
                raise error

    monkeypatch.setattr(display, "progress", lambda *_args, **_options: Progress())
    files = kept(tmp_path)
    result = invoke(*quick, "-p", "the movie", *files["arguments"], code=code)
    files["check"](complete=False, finished=0)
    assert "the movie" in result.stdout
    if isinstance(error, KeyError):
        assert result.exception is error  # a bug keeps its traceback
    elif code != 130:
        assert (str(error) or "MemoryError") in result.stderr
        assert "what is shown is unfinished" in result.stderr


@pytest.mark.parametrize("broken", ["trace", "plot", "json"])
def test_one_file_that_fails_leaves_the_others(quick, tmp_path, monkeypatch, broken) -> None:
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    target = {"trace": (trace, "write"), "plot": (entrgi.trace.plot, "write"), "json": (cli.sample, "write_json")}[
        broken
    ]
    monkeypatch.setattr(*target, fail)
    names = {"trace": "t.jsonl", "plot": "p.png", "json": "j.json"}
    files = [part for option, name in names.items() for part in (f"--{option}", tmp_path / name)]
    result = invoke(*quick, "-p", "the movie", *files, code=1)
    assert "the movie" in result.stdout
    assert "No space left" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(names.values()) - {names[broken]}


def test_an_error_is_told_where_the_reader_is_gone(quick, tmp_path, monkeypatch) -> None:
    def gone(*_args: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(display, "report", gone)
    monkeypatch.setattr(trace, "write", full)
    assert "No space left" in error_line(*quick, "-p", "the", "--trace", tmp_path / "t.jsonl", code=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_interrupts_meanwhile_alone(number) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, signals_interrupt():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL
    before = signal.signal(number, signal.SIG_IGN)  # nohup
    try:
        with signals_interrupt():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


# --- batches and going on -------------------------------------------------------------------------------------------


def test_batches_change_nothing_but_the_order_of_work(several, tmp_path, monkeypatch) -> None:
    results = {}
    for rows in (2048, 16, 1):
        monkeypatch.setattr(memory, "ENOUGH_ROWS", rows)
        folder = tmp_path / str(rows)
        folder.mkdir()
        files = kept(folder)
        invoke(*several, *files["arguments"])
        files["check"](prompts=len(PROMPTS))
        results[rows] = (
            json.loads((folder / "j.json").read_text())["runs"]["entrgi"],
            trace.read(folder / "t.jsonl"),
            [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()],
        )
    whole, traced, lines = results.pop(2048)
    assert [line["index"] for line in lines] == list(range(len(PROMPTS)))
    assert [line["prompt"] for line in lines] == PROMPTS
    for made, found, written in results.values():
        for ours, theirs, line in zip(made["results"], whole["results"], written, strict=True):
            assert ours["texts"] == theirs["texts"] == line["runs"]["entrgi"]["texts"]
            assert ours["trajectory_seeds"] == theirs["trajectory_seeds"] == line["runs"]["entrgi"]["trajectory_seeds"]
            assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-5)
        for name in ("step", "committed", "trajectories", "positions"):
            assert made["history"][name] == whole["history"][name]
        for name in ("reward", "weight"):
            assert made["history"][name] == pytest.approx(whole["history"][name], abs=1e-5)
        assert [prompt.prompt for prompt in found.prompts] == PROMPTS
        for ours, theirs in zip(found.runs[0].steps, traced.runs[0].steps, strict=True):
            assert ours.step == theirs.step
            assert [(p.prompt, p.trajectory, p.commits) for p in ours.trajectories] == [
                (p.prompt, p.trajectory, p.commits) for p in theirs.trajectories
            ]


class Stop:
    """``entrgi.generate`` that ends with ``error`` instead of its call number ``after``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        self.calls, self.sizes, self.after, self.error = 0, [], after, error
        self.plain = entrgi.generate
        monkeypatch.setattr(entrgi, "generate", self, raising=False)

    def __call__(self, prompts: list, *args: object, **options: object) -> object:
        self.calls += 1
        self.sizes.append(len(prompts))
        if self.calls == self.after:
            raise self.error
        return self.plain(prompts, *args, **options)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("gone")], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("torn", [False, True])
def test_finished_prompts_are_kept_and_left_out(several, tmp_path, monkeypatch, one_at_once, error, torn) -> None:
    file, whole = tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    invoke(*several, "-o", whole)
    with monkeypatch.context() as patch:
        Stop(patch, 3, error)
        result = invoke(*several, "-o", file, code=130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "the movie" in result.stdout
    assert lines_of(file) == lines_of(whole)[:2]
    if torn:  # a kill in the middle of a write
        with file.open("a") as opened:
            opened.write(whole.read_text().splitlines()[2][:100] + "x" * 100_000)
    seen = Stop(monkeypatch, 0, error)
    without_seed = several[: several.index("--seed")] + several[several.index("--seed") + 2 :]
    result = invoke(*without_seed, "-o", file, "--resume")
    assert "2 of 5 prompts are in" in result.stderr
    assert seen.sizes == [1, 1, 1]
    assert lines_of(file) == lines_of(whole)
    assert "the movie" not in result.stdout
    result = invoke(*several, "-o", file, "--resume", "--json")
    assert json.loads(result.stdout)["runs"] == {}
    assert seen.calls == 3
    assert lines_of(file) == lines_of(whole)


def test_killed_processes_leave_what_was_finished(several, tmp_path) -> None:
    """The real thing: SIGKILL while the second batch runs."""
    file = tmp_path / "o.jsonl"
    code = (
        "import os, sys, entrgi; from entrgi import cli, memory; memory.ENOUGH_ROWS = 1; plain = entrgi.generate\n"
        "def generate(*a, **o):\n"
        "    if os.path.exists(sys.argv[-1]): os.kill(os.getpid(), 9)\n"
        "    return plain(*a, **o)\n"
        "entrgi.generate = generate; cli.app()"
    )
    done = subprocess.run([sys.executable, "-c", code, *several, "-o", file], check=False, capture_output=True)
    assert done.returncode == -9
    assert [line["index"] for line in lines_of(file)] == [0]
    invoke(*several, "-o", file, "--resume")
    assert [line["index"] for line in lines_of(file)] == [0, 1, 2, 3, 4]


def test_compared_runs_are_in_one_line(several, tmp_path, one_at_once, monkeypatch) -> None:
    file, traced = tmp_path / "o.jsonl", tmp_path / "t.jsonl"
    Stop(monkeypatch, 4, KeyboardInterrupt())  # unguided of the second prompt is done
    invoke(*several, "--compare", "-o", file, "--trace", traced, code=130)
    (line,) = lines_of(file)
    assert list(line["runs"]) == ["unguided", "entrgi"]
    written = trace.read(traced)
    assert [(run.name, run.complete) for run in written.runs] == [("unguided", True), ("entrgi", False)]
    assert [len(run.results) for run in written.runs] == [2, 2]
    assert written.runs[1].results[1].texts == ["", ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "6"], "line 1 was made with seed 5, expected 6"),
        (["--temperature", "0.5"], "line 1 was made with runs.entrgi.temperature 0.7, expected 0.5"),
        (["--guidance", "aps"], "line 1 was made with runs.aps None, expected {"),
        (["--missing", "zero"], "line 1 was made with missing 'unk', expected 'zero'"),
        (["--dtype", "float64"], "line 1 was made with dtype None, expected 'float64'"),
        (["--model", "chat"], "line 1 was made with denoiser '"),
        (["--reward-weight", "2"], "line 1 was made with rewards"),
        (["-p", "first"], "line 1 is of the prompt 'the movie', expected 'first'"),
    ],
    ids=lambda each: str(each),
)
def test_going_on_with_something_else_is_refused(quick, folders, tmp_path, loads_nothing, change, message) -> None:
    file = tmp_path / "o.jsonl"
    config = cli.options.sampler_config("paper", {"num_return_sequences": 2, "max_new_tokens": 4, "guidance_steps": 1})
    options = {option.name: option.default for option in models_of_commands.MODELS}
    options |= {"model": folders["denoiser"], "reward": [folders["reward"]]}
    models = models_of_commands.Models.of(options)
    settings = {**cli.sample.settings_of(models, {"entrgi": config}), "seed": 5}
    file.write_text(json.dumps({"index": 0, "prompt": "the movie", "runs": {}, "settings": settings}) + "\n")
    before = file.read_text()
    arguments = [folders["chat"] if part == "chat" else part for part in change]
    prompts = [] if change[0] == "-p" else ["-p", "the movie"]
    assert message in error_line(*quick, *arguments, *prompts, "-o", file, "--resume")
    assert file.read_text() == before
    invoke(*quick, "-p", "the movie", "-o", file, "--resume")  # the same, so nothing is left to do


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", "line 1: expected a finished prompt of `entrgi sample --output`, got 'nonsense'"),
        ("[1]\n", "line 1: expected a finished prompt"),
        ('{"index": 7}\n', "line 1: expected a finished prompt"),
        ('{"index": -1, "prompt": "a", "settings": {}}\n', "line 1: expected a finished prompt"),
        ('{"index": 9, "prompt": "a", "settings": {}}\n', "line 1 is of prompt number 9, expected one below 1"),
        ("[" * 100_000 + "\n", "line 1: expected a finished prompt"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_files_that_are_no_results_are_refused(quick, tmp_path, loads_nothing, text, message) -> None:
    file = tmp_path / "o.jsonl"
    file.write_text(text)
    assert message in error_line(*quick, "-p", "the", "-o", file, "--resume")
    assert "exists; pass --resume to go on with it" in error_line(*quick, "-p", "the", "-o", file)
    assert file.read_text() == text
    assert "--resume: expected the file to go on with" in error_line(*quick, "-p", "the", "--resume")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_line(*quick, "-p", "the", "-o", tmp_path / "pipe", "--resume")


@pytest.mark.parametrize("message", ["out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_where_memory_ends_fewer_prompts_go_together(several, tmp_path, monkeypatch, message) -> None:
    error = torch.OutOfMemoryError if message == "out of memory" else RuntimeError
    seen = Stop(monkeypatch, 1, error(message))
    plain = seen.plain

    def limited(prompts, *args, **options):
        if len(prompts) > 2:
            seen.sizes.append(len(prompts))
            raise error(message)
        seen.sizes.append(len(prompts))
        return plain(prompts, *args, **options)

    monkeypatch.setattr(entrgi, "generate", limited, raising=False)
    result = invoke(*several, "-o", tmp_path / "o.jsonl")
    assert seen.sizes == [5, 2, 2, 1]
    assert "going on with 2 prompts at once" in result.stderr
    assert [line["index"] for line in lines_of(tmp_path / "o.jsonl")] == [0, 1, 2, 3, 4]


def test_one_prompt_beyond_memory_is_an_error(quick, monkeypatch) -> None:
    Stop(monkeypatch, 1, torch.OutOfMemoryError("out of memory"))
    assert "out of memory" in error_line(*quick, "-p", "the", code=1)


def test_holes_count_for_the_batch(folders, monkeypatch) -> None:
    seen = Stop(monkeypatch, 0, RuntimeError())
    pair = ["--model", folders["denoiser"], "--reward", folders["reward"]]
    prompts = [part for _ in range(4) for part in ("-p", "the [MASK] was [MASK] [MASK]")]
    monkeypatch.setattr(memory, "ENOUGH_ROWS", 6)
    invoke("sample", *pair, "-k", "1", "-m", "1", "--infill", "-l", "0", *prompts)
    assert seen.sizes == [2, 2]


def test_errors_of_what_is_left_name_the_prompt_among_all(several, tmp_path, monkeypatch, one_at_once) -> None:
    with monkeypatch.context() as patch:
        Stop(patch, 3, KeyboardInterrupt())
        invoke(*several, "-o", tmp_path / "o.jsonl", code=130)
    line = error_line(*several, "-p", "the [MASK]", "-o", tmp_path / "o.jsonl", "--resume")
    assert "prompts[5] holds the mask" in line


@pytest.mark.parametrize(
    ("prompt", "message"), [("the [MASK]", "prompts[3] holds the mask"), ("w1 " * 60, "prompts[3] ")]
)
def test_wrong_prompts_are_found_before_the_first_batch(quick, monkeypatch, one_at_once, prompt, message) -> None:
    seen = Stop(monkeypatch, 0, RuntimeError())
    named = [part for each in (*PROMPTS[:3], prompt) for part in ("-p", each)]
    assert message in error_line(*quick, *named)
    assert not seen.calls


def test_memory_decides_the_batch(monkeypatch, free_memory) -> None:
    config = entrgi.preset("paper", max_new_tokens=128, num_return_sequences=4)
    shape = {"length": 200, "vocab": 152_064, "logit_bytes": 2, "device": torch.device("cpu")}
    for free, expected in ((10**15, 4), (20 * 10**9, 4), (8 * 10**9, 2), (10**9, 1), (None, 4)):
        monkeypatch.setattr(memory, "available", lambda _device=None, free=free: free)
        assert memory.prompts_at_once(config, **shape) == expected
    short = entrgi.preset("paper", max_new_tokens=16, num_return_sequences=4)
    assert memory.prompts_at_once(short, **shape) == 32
    assert memory.prompts_at_once(short, **{**shape, "length": 4000}) == 2
    assert memory.prompts_at_once(short, **{**shape, "length": 10**6}) == 1
    # N rows of V logits in bf16 with two fp32 moments, and the rest
    assert memory.at_least(config, 1, 152_064, 2) == pytest.approx(512 * 152_064 * 10, rel=0.01)
    assert memory.at_least(entrgi.preset("paper", guidance="none"), 1, 1000, 4) < 512 * 1000 * 4 * 1.1
    assert memory.at_least(entrgi.preset("paper", max_rows=128), 1, 152_064, 2) < 128 * 152_064 * 10 * 1.1
    free = free_memory()
    assert free is None or 2**20 < free < 2**50


def test_what_is_free(tmp_path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\nHugePages_Total: 0\n")
    assert memory._host(tmp_path / "meminfo") == 7 * 1024
    assert memory._host(tmp_path / "nothing") > 2**20  # all there is
    assert memory._group(tmp_path) is None
    for limit, expected in (("max\n", None), ("1000\n", 600), ("100\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("700\n")
        (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 200\n")
        assert memory._group(tmp_path) == expected


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "1000000000"], "num_return_sequences 1000000000, max_new_tokens 16, steps 16: 1 prompt would need at"),
        (["-l", "1000000000"], "max_new_tokens 1000000000"),
        (["-t", "1000000000"], "steps must be <= 16777216, got 1000000000"),
        (["--best-of", "1000000000"], "best_of 1000000000"),
        (["-m", "1000000000"], "guidance_steps 1000000000"),
        (["--row-bucket", "100000000000"], "row_bucket 100000000000"),
        (
            ["--top-k", "1000000000"],
            "--top-k must be <= 16777216, got 1000000000: a row of so many logits would need at ",
        ),
        (["-k", "9" * 30], "num_return_sequences must be an integer of 64 bits, got 999"),
        (["-l", "9" * 30], "max_new_tokens must be an integer of 64 bits"),
        (["-t", "9" * 30], "steps must be "),
        (["--max-rows", "9" * 30], "max_rows must be an integer of 64 bits"),
        (["--block-length", "9" * 30], "block_length must be an integer of 64 bits"),
        (["--guidance-interval", "9" * 30], "guidance_interval must be an integer of 64 bits"),
        (["--guidance-interval", "1:" + "9" * 30], "guidance_interval must be integers of 64 bits"),
        (["--guidance-interval", "9" * 5000], "--guidance-interval: expected a number of steps"),
        (["-k", "9" * 5000], "--num-return-sequences: expected an integer, got '999"),
        (["--seed", str(2**63)], "--seed must be in [-2^63, 2^63), got 9223372036854775808"),
        (["--seed", str(2**64)], "--seed must be in [-2^63, 2^63)"),
        (["--seed", str(-(2**63) - 1)], "--seed must be in [-2^63, 2^63)"),
        (["--temperature", "1e400"], "temperature must be 0 or in [1e-6, 1e6], got inf"),
        (["--temperature", "nan"], "temperature must be 0 or in [1e-6, 1e6], got nan"),
        (["--reward-scale", "-inf"], "reward_scale must be finite, got -inf"),
        (["--reward-weight", "nan"], "--reward-weight must be finite, got nan"),
        (["-l", "1.5"], "--max-new-tokens: expected an integer, got '1.5'"),
        (["--temperature", "hot"], "--temperature: expected a number, got 'hot'"),
    ],
    ids=lambda each: str(each)[:40],
)
@pytest.mark.parametrize("command", ["sample", "profile"])
def test_numbers_that_nothing_could_hold(loads_nothing, command, arguments, message) -> None:
    if command == "profile" and arguments[0] == "--seed":
        pytest.skip("its draws do not matter")
    assert message in error_line(command, *arguments)


@pytest.mark.parametrize("arguments", [["-k", "1000000000"], ["-l", "1000000000"], ["--best-of", "1000000000"]])
def test_what_is_missing_is_told_in_bytes(loads_nothing, arguments) -> None:
    line = error_line("sample", *arguments)
    assert any(f" {unit} of memory" in line for unit in ("GB", "TB", "PB"))
    assert "are free" in line


@pytest.mark.parametrize("option", ["num_return_sequences", "max_new_tokens", "best_of"])
def test_python_refuses_them_too(option) -> None:
    with pytest.raises(ValueError, match=rf"{option} 1000000000.* would need at least .* of memory"):
        entrgi.generate("the", tiny.denoiser(), tiny.bert_reward(), seed=0, **{option: 10**9})


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("vocabulary", ["-l", "100000000000"], "max_new_tokens 100000000000"),
        ("vocabulary", ["-l", "9" * 30], "max_new_tokens must be an integer of 64 bits"),
        ("vocabulary", ["--top", "-1"], "--top: expected an integer >= 0 and <= 9223372036854775807, got '-1'"),
        ("vocabulary", ["--top", "9" * 30], "--top: expected an integer >= 0 and <= 9223372036854775807, got '999"),
        ("profile", ["--first-steps", "0"], "--first-steps: expected an integer >= 1 and <= 16777216, got '0'"),
        ("profile", ["--repeats", "0"], "--repeats: expected an integer >= 1 and <= 10000, got '0'"),
        ("profile", ["--seed", str(2**64)], "--seed: expected an integer >= -9223372036854775808 and <= 922"),
        ("plan", ["--rows", "9" * 5000], "--rows"),
        ("plan", ["--vocab", "9" * 5000], "--vocab"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_numbers_of_other_commands(command, arguments, message) -> None:
    assert message in error_line(command, *arguments)


@pytest.mark.parametrize("seed", [2**63, 2**64, 2**64 + 1, -(2**63) - 1, 10**30])
def test_seeds_that_would_be_another_are_refused(seed) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer in \[-2\^63, 2\^63\), got "):
        entrgi.generate("the", tiny.denoiser(), tiny.bert_reward(), seed=seed, max_new_tokens=2, steps=2)


def test_seeds_of_64_bits_are_distinct() -> None:
    from entrgi.generation import derive_seeds

    bases = [0, 1, -1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), -(2**63) + 1, 2**62]
    assert len({tuple(derive_seeds(base, 1, 2)[0].tolist()) for base in bases}) == len(bases)


# --- seeds in JSON --------------------------------------------------------------------------------------------------


def as_javascript(text: str) -> object:
    """As readers that know floating-point numbers alone read it."""
    return json.loads(text, parse_int=lambda digits: int(float(digits)))


@pytest.mark.parametrize("seed", [5, -1, 2**53 - 1, 2**53 + 1, -(2**62) - 1])
def test_seeds_survive_readers_of_53_bits(quick, tmp_path, seed) -> None:
    arguments = [*quick[: quick.index("--seed")], "-p", "the movie", "-p", "w1", "--compare"]
    files = ["--trace", tmp_path / "t.jsonl", "-o", tmp_path / "o.jsonl"]
    result = as_javascript(invoke(*arguments, "--seed", seed, "--json", *files).stdout)
    assert int(result["seed"]) == seed
    parts = result["runs"]["entrgi"]["results"]
    texts = [each["texts"] for each in parts]
    expected = entrgi.generation.derive_seeds(seed, 2, 2).tolist()
    assert [list(map(int, each["trajectory_seeds"])) for each in parts] == expected
    end = as_javascript((tmp_path / "t.jsonl").read_text().splitlines()[-1])
    assert [list(map(int, each["seeds"])) for each in end["results"]] == expected
    assert int(as_javascript((tmp_path / "t.jsonl").read_text().splitlines()[0])["source"]["seed"]) == seed
    line = as_javascript((tmp_path / "o.jsonl").read_text().splitlines()[1])
    assert list(map(int, line["runs"]["entrgi"]["trajectory_seeds"])) == expected[1]
    assert int(line["settings"]["seed"]) == seed
    for given in (",".join(s for each in parts for s in each["trajectory_seeds"]), None):
        named = (
            ["--trajectory-seeds", given]
            if given
            else [p for each in parts for p in ("--trajectory-seeds", ", ".join(each["trajectory_seeds"]))]
        )
        again = json.loads(invoke(*arguments, *named, "--json").stdout)
        assert [each["texts"] for each in again["runs"]["entrgi"]["results"]] == texts
        assert again["seed"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1"], "--trajectory-seeds: expected 2 for each of 1 prompts, 2 in all, got 1"),
        (["1,2,3"], "2 in all, got 3"),
        (["1,x"], "--trajectory-seeds: expected integers of 64 bits, got 'x'"),
        (["1,"], "expected integers of 64 bits, got ''"),
        (["1,1.5"], "expected integers of 64 bits, got '1.5'"),
        (["1,9223372036854775808"], "expected integers of 64 bits"),
        (["1," + "9" * 5000], "expected integers of 64 bits"),
        (["1,\u00b2"], "expected integers of 64 bits"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_wrong_trajectory_seeds(quick, loads_nothing, given, message) -> None:
    arguments = quick[: quick.index("--seed")]
    assert message in error_line(*arguments, "-p", "the", *(p for each in given for p in ("--trajectory-seeds", each)))
    assert "expected one of --seed" in error_line(*quick, "-p", "the", "--trajectory-seeds", "1,2")


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\udcffb", "\ud800", "a\0b"], ids=ascii)
@pytest.mark.parametrize(
    "option",
    [
        *("--prompt", "--system", "--model", "--reward", "--adapter", "--model-adapter", "--device", "--alg"),
        *("--preset", "--guidance-interval", "--trajectory-seeds", "--prompts-file", "--messages", "--trace", "--plot"),
        *("--output", "--json"),
    ],
)
def test_invalid_text_names_its_option(loads_nothing, option, text) -> None:
    is_file = option in ("--prompts-file", "--messages", "--trace", "--plot", "--output", "--json")
    if is_file and "\0" not in text:
        pytest.skip("file names are bytes")
    assert error_line("sample", "-p", "the", option, text).startswith(f"error: {option}")


@pytest.mark.parametrize(
    ("command", "option"), [("vocabulary", "--model"), ("vocabulary", "--prompt"), ("plan", "--op"), ("view", "-o")]
)
def test_invalid_text_of_other_commands(command, option, tmp_path) -> None:
    trace.write(tmp_path / "t.jsonl", traces.trace())
    arguments = [tmp_path / "t.jsonl"] if command == "view" else []
    line = error_line(command, *arguments, option, "a\0b")
    assert line.startswith(f"error: {'--output' if option == '-o' else option}")


TYPOS = [
    *(["sample", option.flag, "typo"] for option in SAMPLER if option.choices or option.kind is not str),
    *(["sample", flag, "typo"] for flag in ("--preset", "--dtype", "--missing", "--reward-kind", "--seed")),
    *(["sample", flag, "./typo"] for flag in ("--model", "--reward", "--prompts-file", "--messages")),
    ["sample", "--adapter", "./typo", "--reward", "hub/id"],
    ["sample", "--model-adapter", "./typo", "--model", "hub/id"],
    ["sample", "--tmeperature", "1"],
    ["sample", "--trace", "no/folder/x"],
    ["sample", "--plot", "x.gif"],
    ["sample", "--json", "no/folder/x"],
    ["sample", "--output", "no/folder/x"],
    ["smaple"],
    ["profile", "--alg", "typo"],
    ["profile", "--plot", "x.gif"],
    ["vocabulary", "--model", "./typo"],
    ["vocabulary", "--reward", "./typo"],
    ["plan", "--logits-dtype", "typo"],
    ["view", "typo.jsonl"],
    ["view", "--otuput", "x"],
]
SWITCHES = {option.flag for option in SAMPLER if option.kind is bool}


def test_a_typo_costs_no_import() -> None:
    """All of them in one process, in which torch and transformers are never imported."""
    typos = [arguments for arguments in TYPOS if len(arguments) < 2 or arguments[1] not in SWITCHES]
    code = (
        "import json, sys; from typer.testing import CliRunner; from entrgi.cli import app\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 2, (arguments, result.output)\n"
        "    assert result.stderr.startswith('error: ') and result.stderr.count('\\n') == 1, result.output\n"
        "    loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert not loaded, (arguments, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(typos)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_one():
    assert entrgi.__version__ == metadata.version("entrgi")
    assert entrgi.__version__ in CliRunner().invoke(cli.app, ["--version"]).output


@pytest.mark.parametrize("module", ["entrgi", "entrgi.cli"])
@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["--help"], ["sample", "-h"], ["view", "--help"]])
def test_help_and_version_need_no_torch(module, arguments) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: entrgi" in done.stdout or done.stdout.startswith("entrgi ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "entrgi.cli" in imported
    assert not imported & {"torch", "transformers", "numpy", "matplotlib"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("entrgi sa", ["sample"]),
        ("entrgi sample --alg ", ["entropy", "maskgit_plus", "topk_margin", "anchor", "random", "origin"]),
        ("entrgi sample --guidance e", ["entrgi", "expectation"]),
        ("entrgi sample --preset r", ["rgrl"]),
        ("entrgi profile --optimizer ", ["adam", "sgd"]),
        ("entrgi plan --logits-dtype b", ["bfloat16"]),
        ("entrgi plan --op adam", ["adam_step_"]),
        ("entrgi sample --trajectory-s", ["--trajectory-seeds"]),
    ],
)
def test_shells_complete(line, expected) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    result = CliRunner().invoke(cli.app, [], prog_name="entrgi", env={"_ENTRGI_COMPLETE": "complete_bash", **words})
    assert result.stdout.split() == expected


# --- the embedded pair by its name ----------------------------------------------------------------------------------


def test_demo_is_a_name() -> None:
    named = entrgi.load_denoiser("demo"), entrgi.load_reward("demo", unmapped="zero")
    pair = entrgi.MaskedLM(*entrgi.demo.load_denoiser()), entrgi.SequenceClassifierReward(*entrgi.demo.load_reward())
    options = {"max_new_tokens": 3, "steps": 3, "num_return_sequences": 1, "guidance_steps": 1, "seed": 0}
    made, expected = (entrgi.generate("The movie was", *models, **options) for models in (named, pair))
    assert made.texts == expected.texts
    assert torch.equal(made.rewards, expected.rewards)
    assert entrgi.load_denoiser("demo", dtype=torch.bfloat16, device="cpu", max_length=50).max_length == 50
    for dtype in (torch.float64, "float64"):
        assert entrgi.load_reward("demo", dtype=dtype, local_files_only=True, kind=None).model.dtype == torch.float64


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (entrgi.load_denoiser, {"adapter": "a"}, "denoiser: the embedded pair takes no adapter, got 'a'"),
        (entrgi.load_reward, {"adapter": "a"}, "reward: the embedded pair takes no adapter, got 'a'"),
        (
            entrgi.load_reward,
            {"kind": "likelihood"},
            "kind: the embedded pair's reward is a classifier, got 'likelihood'",
        ),
        (entrgi.load_denoiser, {"colour": 1}, "denoiser: the embedded pair takes no colour, got 1"),
        (entrgi.load_reward, {"num_labels": 3}, "reward: the embedded pair takes no num_labels, got 3"),
        (entrgi.load_reward, {"dtype": "int8"}, "reward: dtype must be one of float32, .*, got 'int8'"),
    ],
)
def test_what_the_demo_does_not_take(load, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        load("demo", **options)


def test_the_demo_reads_chats(tmp_path) -> None:
    """As the README's command has it."""
    chats = [[{"role": "user", "content": "The movie was"}], [{"role": "system", "content": "I"}, *CHAT[1:]]]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    arguments = ["-k", "1", "-l", "2", "-t", "2", "-m", "1", "--seed", "1", "--json"]
    read = json.loads(invoke("sample", "--messages", tmp_path / "chats.json", *arguments).stdout)
    plain = json.loads(invoke("sample", "-p", "The movie was", "-p", "I w2 w3", *arguments).stdout)
    assert read["runs"]["entrgi"]["results"] == plain["runs"]["entrgi"]["results"]
    system = json.loads(invoke("sample", "-p", "was", "--system", "The movie", *arguments).stdout)
    assert system["runs"]["entrgi"]["results"][0]["prompt"] == "The movie was"


# --- prompts --------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
]
TEXT = "the movie\r\n\nw1 \u2028 w2\n w3"
JSON_LINES = "\n".join(
    map(json.dumps, ["the movie", {"prompt": "w1"}, {"messages": CHAT, "id": 3}, CHAT, {"prompt": CHAT}])
)


def given(option: str, file: str) -> dict[str, object]:
    return {"prompt": None, "prompts_file": None, "messages": None, "system": None} | {option: Path(file)}


@pytest.mark.grid(strength=2, only=lambda p: (p["source"], p["name"]) != ("stdin", "p.jsonl"))  # it has no ending
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("source", ["file", "pipe", "stdin"])
@pytest.mark.parametrize(
    ("option", "name", "text", "expected"),
    [
        ("prompts_file", "p.txt", TEXT, ["the movie", "w1 \u2028 w2", " w3"]),
        ("prompts_file", "p.jsonl", JSON_LINES, ["the movie", "w1", CHAT, CHAT, CHAT]),
        ("messages", "m.json", json.dumps(CHAT), [CHAT]),
        ("messages", "m.json", json.dumps([CHAT, CHAT], indent=2), [CHAT, CHAT]),
        ("messages", "m.jsonl", f"{json.dumps(CHAT)}\n{json.dumps({'messages': CHAT})}\n", [CHAT, CHAT]),
        ("messages", "m.txt", f"{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}", [CHAT, CHAT]),
        ("messages", "m.json", json.dumps({"messages": CHAT}), [CHAT]),
    ],
    ids=range(7),
)
def test_prompts_are_read_from_anywhere(tmp_path, monkeypatch, encoding, source, option, name, text, expected) -> None:
    file, data = tmp_path / name, text.encode(encoding)
    if source == "stdin":
        file = "-"
        (tmp_path / "in").write_bytes(data)
        with (tmp_path / "in").open() as opened:
            monkeypatch.setattr(sys, "stdin", opened)
            assert cli.prompts.read_prompts(given(option, file), False) == expected
        return
    if source == "pipe":
        os.mkfifo(file)
        threading.Thread(target=file.write_bytes, args=(data,), daemon=True).start()
    else:
        file.write_bytes(data)
    assert cli.prompts.read_prompts(given(option, file), False) == expected


def test_prompts_through_a_real_pipe(quick) -> None:
    result = invoke(*quick, "--prompts-file", "-", "--json", input="the movie\nw1\n")
    assert [each["prompt"] for each in json.loads(result.stdout)["runs"]["entrgi"]["results"]] == ["the movie", "w1"]
    read, write = os.pipe()
    os.write(write, b"w2\n")
    os.close(write)
    result = invoke(*quick, "--prompts-file", f"/dev/fd/{read}", "--json")  # as <(...) in a shell
    os.close(read)
    assert [each["prompt"] for each in json.loads(result.stdout)["runs"]["entrgi"]["results"]] == ["w2"]


@pytest.mark.parametrize(
    ("option", "name", "data", "message"),
    [
        ("--messages", "m.json", b"[" * 100_000, "is JSON nested too deep"),
        ("--messages", "m.json", b'{"a":' * 100_000, "is JSON nested too deep"),
        ("--prompts-file", "p.jsonl", b"[" * 100_000, "line 1' is JSON nested too deep|line 1 is JSON nested too deep"),
        ("--messages", "m.json", b"9" * 5000, "is not JSON"),
        ("--messages", "m.json", b"", "is not JSON"),
        ("--messages", "m.jsonl", b'[{"role": "user", "content": "a"}]\n{', "line 2 is not JSON"),
        ("--messages", "m.json", b"\xff\xfe\x00", "cannot be read as text"),
        ("--messages", "m.json", b"\x80", "cannot be read as text"),
        ("--prompts-file", "p.txt", b"a\xffb", "cannot be read as text"),
        ("--prompts-file", "p.txt", b"", "--prompt: expected at least one prompt"),
        ("--prompts-file", "p.jsonl", b"1", "line 1: expected a text, a list of messages"),
        ("--prompts-file", "p.jsonl", b'{"text": "a"}', "line 1: expected a text, a list of messages"),
        ("--prompts-file", "p.jsonl", b'\n"a"\n{"messages": [1]}', "line 3: expected text or messages with 'role'"),
        (
            "--prompts-file",
            "p.jsonl",
            b'{"prompt": "a", "tools": [1]}',
            "line 1: 'tools' is not read, expected 'prompt'",
        ),
        ("--prompts-file", "folder", None, "is a folder, expected a file"),
        ("--prompts-file", "a" * 300, None, "cannot be read: File name too long"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_prompts_that_cannot_be_read(tmp_path, loads_nothing, option, name, data, message) -> None:
    (tmp_path / "folder").mkdir()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    line = error_line("sample", option, tmp_path / name)
    assert any(part in line for part in message.split("|"))
    assert "--prompt" in line or option in line


def test_standard_input_is_read_once(loads_nothing) -> None:
    arguments = ["sample", "--prompts-file", "-", "--messages", "-"]
    assert "standard input is read by --prompts-file already" in error_line(*arguments, input="a")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [("--trace", "--plot"), ("--trace", "--output"), ("--json", "--trace"), ("--output", "--json")]
)
@pytest.mark.parametrize("other", ["same.png", "./same.png", "link.png"])
def test_one_file_is_not_written_twice(tmp_path, monkeypatch, loads_nothing, pair, other) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to("same.png")
    assert "is the file of --" in error_line("sample", pair[0], "same.png", pair[1], other)
    assert not Path("same.png").exists()


@pytest.mark.parametrize("option", ["--trace", "--output", "--json"])
@pytest.mark.parametrize("source", ["--prompts-file", "--messages"])
def test_what_is_read_is_not_overwritten(tmp_path, loads_nothing, option, source) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(CHAT))
    assert f"is the file of {source}, too" in error_line("sample", source, file, option, file)
    assert json.loads(file.read_text()) == CHAT


@pytest.mark.parametrize("option", ["--trace", "--plot", "--output", "--json"])
@pytest.mark.parametrize("name", ["a" * 300 + ".png", "no/folder/x.png", ".", "file/x.png"])
def test_targets_are_checked_before_a_model_is_loaded(tmp_path, loads_nothing, option, name) -> None:
    (tmp_path / "file").write_text("")
    assert error_line("sample", option, tmp_path / name).startswith(f"error: {option}: ")


def test_special_files_stay_what_they_are(quick, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    invoke(*quick, "-p", "the", "--trace", tmp_path / "pipe", "--json", "/dev/null", "--output", "/dev/null")
    reader.join(timeout=20)
    assert json.loads(received[0].splitlines()[0])["kind"] == "header"
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


# --- --json and --plot alike ----------------------------------------------------------------------------------------

COMMANDS = {
    "sample": ["-p", "the movie", "-k", "1", "-l", "2", "-t", "2", "-m", "1"],
    "profile": ["-p", "the movie", "-k", "1", "-l", "2", "-m", "1", "--repeats", "1", "--first-steps", "1"],
    "vocabulary": [],
    "plan": ["--rows", "8"],
    "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_json_goes_to_a_file_or_to_standard_output(command, folders, tmp_path) -> None:
    pair = ["--model", folders["denoiser"], "--reward", folders["reward"]]
    arguments = [command, *([] if command in ("plan", "doctor") else pair), *COMMANDS[command]]
    result = invoke(*arguments, "--json", tmp_path / "j.json")
    assert result.stdout.strip()  # people see what they saw
    written = json.loads((tmp_path / "j.json").read_text(), parse_constant=pytest.fail)
    for form in (["--json"], ["--json", "-"], ["--json=-"]):
        shown = json.loads(invoke(*arguments, *form).stdout, parse_constant=pytest.fail)
        assert shown.keys() == written.keys()
        if form == ["--json"]:
            assert json.loads(invoke(command, "--json", *arguments[1:]).stdout).keys() == written.keys()
    assert "--json: no folder" in error_line(*arguments, "--json", "no/folder/x")


def test_json_may_be_another_option_s_value(quick) -> None:
    result = json.loads(invoke(*quick, "-p", "--json", "--json").stdout)
    assert result["runs"]["entrgi"]["results"][0]["prompt"] == "--json"


@pytest.mark.parametrize("command", ["sample", "profile"])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plots_have_every_format(command, ending, folders, tmp_path) -> None:
    file = tmp_path / f"p.{ending}"
    pair = ["--model", folders["denoiser"], "--reward", folders["reward"]]
    invoke(command, *pair, *COMMANDS[command], "--plot", file)
    assert file.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])


# --- entrgi plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 100, 120, 160, 200])
def test_plans_fit_the_terminal(columns) -> None:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, ["plan", "--arch", "90"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "\u2026" not in result.stdout
    whole = CliRunner(env={"COLUMNS": None}).invoke(cli.app, ["plan", "--arch", "90"]).stdout
    if columns >= 60:
        words = result.stdout.split()
        for word in set(whole.split()):
            assert word in words or "\u2500" in word
