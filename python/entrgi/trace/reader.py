"""From a file to its trace, every field checked: a file from a stranger costs no more than its size, or is refused."""

from __future__ import annotations

import json
import math
import re
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

from entrgi.trace.schema import FORMAT, VERSION, Result, Run, Trace, TracedPrompt, TraceStep, TrajectoryStep

MAX_BYTES = 2**29  # browsers hold no longer text
CHUNK = 2**20
MAX_STEPS = 2**31
MIN_CELLS = 2**20  # a page may draw so many cells whatever the file's size: an interrupted run lists few columns
LARGEST = 3.5e38  # beyond fp32
MAX_ENTROPY, MAX_WEIGHT, ROUNDING = 64.0, 1.0, 0.01
SCALARS = (str, int, float, bool, type(None))
INTEGER = re.compile(r"-?\d{1,19}")


class TraceError(ValueError):
    """A file is not a trace: the message names the file, the line, and what was expected there."""


def read(path: Path) -> Trace:
    """Read and check a file.

    Raises:
        TraceError: naming the file, the line, and what was expected there.
    """
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise TraceError(f"{path}: not readable as a trace: expected a file or a pipe")
            data = bytearray()
            while chunk := file.read(CHUNK):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise TraceError(f"{path}: not readable as a trace: expected at most {MAX_BYTES} bytes")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise TraceError(f"no file {str(path)!r}") from None
    except TraceError:
        raise
    except (OSError, ValueError) as error:  # not UTF-8; a name that holds NUL
        raise TraceError(f"{str(path)!r}: not readable as a trace: {error}") from error
    return _Reader(path, text).trace()


class _Reader:
    """Lines of a file in turn, with the place for messages."""

    def __init__(self, path: Path, text: str) -> None:
        # Not splitlines: a piece may hold characters that it takes for line ends.
        self.path, self.rows, self.number = path, text.removesuffix("\n").split("\n"), 0
        self.size = len(text)

    def trace(self) -> Trace:
        header = self.line("header")
        found = (header.get("format"), header.get("version"))
        self.expect(found[0] == FORMAT, f"the format {FORMAT!r}, got {found[0]!r:.60}")
        self.expect(found[1] == VERSION and type(found[1]) is int, f"version {VERSION}, got {found[1]!r:.60}")
        prompts = [self.prompt(prompt) for prompt in self.objects(header, "prompts", "prompt", "width", "given")]
        copies = self.integer(header, "copies", 1)
        names = [(run["name"], self.config(run)) for run in self.objects(header, "runs", "name", "config")]
        self.expect(bool(prompts) and bool(names), "at least one prompt and one run")
        known = [name for name, _ in names]
        distinct = all(isinstance(name, str) for name in known) and len(set(known)) == len(known)
        self.expect(distinct, f"different texts as the names of runs, got {known!r:.60}")
        # Each trajectory has its results in the file, so that neither number can be made up.
        few = len(prompts) * copies * len(names) <= self.size
        self.expect(few, f"fewer trajectories than a file of {self.size} characters can hold, got {copies} copies")
        cells = max(prompt.width for prompt in prompts) * copies * len(names)
        self.expect(
            cells <= max(self.size, MIN_CELLS),
            f"smaller windows in a file of {self.size} characters, got {cells} columns for one prompt",
        )
        source, special = self.source(header), self.texts(header, "special")
        runs = [self.run(name, config, prompts, copies) for name, config in names]
        self.number += 1
        self.expect(self.number > len(self.rows), "the end of the file after the last run's end")
        return Trace(source, special, prompts, copies, runs)

    def prompt(self, data: dict) -> TracedPrompt:
        width, given = self.integer(data, "width", 1), self.commits(data, "given")
        outside = sorted({column for column, _ in given if column >= width})
        self.expect(not outside, f"columns below the width {width} in 'given', got {outside[:8]}")
        prompt = data["prompt"]
        self.expect(
            isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))),
            f"a text or messages with the texts 'role' and 'content' as 'prompt', got {prompt!r:.60}",
        )
        return TracedPrompt(prompt, width, given)

    def config(self, run: dict) -> dict:
        config = self.value(run, "config", dict)
        for name, value in config.items():
            is_list = isinstance(value, list) and all(isinstance(item, SCALARS) for item in value)
            self.expect(is_list or isinstance(value, SCALARS), f"a number or a text as {name!r}, got {value!r:.60}")
        self.value(config, "guidance", str)
        self.integer(config, "steps", 1, MAX_STEPS)
        for name in ("max_new_tokens", "guidance_steps"):
            if name in config:
                self.integer(config, name, 0, 2**63 - 1)
        for name in ("guidance_lr", "temperature"):
            if name in config:
                self.real(config, name, -LARGEST, LARGEST)
        return config

    def source(self, header: dict) -> dict:
        source = self.value(header, "source", dict)
        rewards = source.get("rewards", [])
        named = isinstance(rewards, list) and all(
            isinstance(each, str) or (isinstance(each, dict) and isinstance(each.get("name"), str)) for each in rewards
        )
        self.expect(named, f"a list of names, or of objects with the text 'name', as 'rewards', got {rewards!r:.60}")
        for name in ("denoiser", "seed", "device", "entrgi"):
            value = source.get(name)
            self.expect(isinstance(value, SCALARS), f"a text or a number as {name!r}, got {value!r:.60}")
        return source

    def run(self, name: str, config: dict, prompts: list[TracedPrompt], copies: int) -> Run:
        steps: list[TraceStep] = []
        masked: dict[tuple[int, int], list[int]] = {}
        line = self.line("step", "end", run=name)
        while line["kind"] == "step":
            index = self.integer(line, "step", steps[-1].step + 1 if steps else 0, config["steps"] - 1)
            names = [field.name for field in fields(TrajectoryStep)]
            parts = [self.part(data, prompts, copies, masked) for data in self.objects(line, "trajectories", *names)]
            keys = [(part.prompt, part.trajectory) for part in parts]
            self.expect(len(set(keys)) == len(keys), "every trajectory at most once in a step")
            steps.append(TraceStep(index, self.real(line, "seconds", 0, LARGEST), parts))
            line = self.line("step", "end", run=name)
        names = [field.name for field in fields(Result)]
        results = [self.result(data, copies) for data in self.objects(line, "results", *names)]
        self.expect(len(results) == len(prompts), f"results of {len(prompts)} prompts, got {len(results)}")
        complete = self.value(line, "complete", bool)
        return Run(name, config, steps, complete, results, self.real(line, "seconds", 0, LARGEST))

    def result(self, data: dict, copies: int) -> Result:
        lengths = {len(self.value(data, field.name, list)) for field in fields(Result)}
        self.expect(lengths == {copies}, f"results with {copies} trajectories")
        self.numbers(data, "rewards", -LARGEST, LARGEST)
        seeds = []
        for seed in data["seeds"]:
            is_integer = type(seed) is int or (isinstance(seed, str) and INTEGER.fullmatch(seed))
            fits = is_integer and -(2**63) <= int(seed) < 2**63
            self.expect(fits, f"integers of 64 bits, or texts of them, in 'seeds', got {seed!r:.60}")
            seeds.append(int(seed))
        return Result(self.texts(data, "texts"), self.texts(data, "responses"), data["rewards"], seeds)

    def part(
        self, data: dict, prompts: list[TracedPrompt], copies: int, masked: dict[tuple[int, int], list[int]]
    ) -> TrajectoryStep:
        key = (data["prompt"], data["trajectory"])
        known = all(type(x) is int for x in key) and 0 <= key[0] < len(prompts) and 0 <= key[1] < copies
        self.expect(known, f"a prompt and a trajectory of the header, got {list(key)!r:.60}")
        commits, columns = self.commits(data, "commits"), self.value(data, "columns", list)
        expected = masked.get(key)
        prompt = prompts[key[0]]
        if expected is None and prompt.width <= max(MIN_CELLS, len(columns) + len(prompt.given)):
            expected = self.holes(prompt)
        if columns != expected or not all(type(column) is int for column in columns):
            those = "of the window" if expected is None else _short(expected)
            raise self.error(f"columns {those}, those still masked, got {_short(columns)}")
        for name, highest in (("entropy", MAX_ENTROPY), ("weight", MAX_WEIGHT)):
            if name == "weight" and data[name] is None:
                continue
            values = self.value(data, name, list)
            self.expect(len(values) == len(columns), f"one {name} for each of {len(columns)} columns")
            self.numbers(data, name, -ROUNDING, highest + ROUNDING)
        if data["reward"] is not None:
            fits = _is_real(data["reward"]) and abs(data["reward"]) <= LARGEST
            self.expect(fits, f"a number or null as 'reward', at most {LARGEST}, got {data['reward']!r:.60}")
        done = {column for column, _ in commits}
        wrong = sorted(done.difference(columns))
        self.expect(not wrong, f"commits to masked columns, got {_short(wrong)}")
        masked[key] = [column for column in columns if column not in done]
        return TrajectoryStep(**{**data, "commits": commits})

    def holes(self, prompt: TracedPrompt) -> list[int]:
        given = {column for column, _ in prompt.given}
        return [column for column in range(prompt.width) if column not in given]

    def line(self, *kinds: str, run: str | None = None) -> dict:
        """The next line, of one of ``kinds`` and of ``run``."""
        self.number += 1
        wanted = " or ".join(repr(kind) for kind in kinds) + (f" of run {run!r}" if run is not None else "")
        self.expect(self.number <= len(self.rows), f"a line of kind {wanted}, got the end of the file")
        row = self.rows[self.number - 1]
        try:
            line = json.loads(row, parse_constant=_refuse, parse_float=_finite)
        except RecursionError as error:
            raise self.error(f"a line of JSON, got one nested too deep, {row[:60]!r}") from error
        except ValueError as error:
            raise self.error(f"a line of JSON, got {row[:60]!r} ({error})") from error
        self.expect(isinstance(line, dict), f"a JSON object, got {row[:60]!r}")
        found = (line.get("kind"), line.get("run"))
        fits = isinstance(found[0], str) and found[0] in kinds and found[1] == run
        self.expect(fits, f"a line of kind {wanted}, got {found[0]!r:.60} of {found[1]!r:.60}")
        return line

    def value(self, line: dict, name: str, kind: type) -> Any:
        value = line.get(name)
        if not isinstance(value, kind):
            raise self.error(f"{name!r} to be of type {kind.__name__}, got {value!r:.60}")
        return value

    def integer(self, line: dict, name: str, minimum: int, maximum: int | None = None) -> int:
        value: Any = line.get(name)
        fits = type(value) is int and value >= minimum
        self.expect(fits, f"{name!r} to be an integer >= {minimum}, got {value!r:.60}")
        self.expect(maximum is None or value <= maximum, f"{name!r} to be at most {maximum}, got {value!r:.60}")
        return value

    def real(self, line: dict, name: str, minimum: float, maximum: float) -> float:
        value: Any = line.get(name)
        self.expect(_is_real(value), f"{name!r} to be of type float, got {value!r:.60}")
        self.expect(minimum <= value <= maximum, f"{name!r} in [{minimum}, {maximum}], got {value!r:.60}")
        return value

    def numbers(self, line: dict, name: str, minimum: float, maximum: float) -> None:
        """Check that the list ``line[name]`` holds numbers in a range, or null."""
        for value in line[name]:
            if value is None:
                continue
            if not _is_real(value):
                raise self.error(f"numbers or null in {name!r}, got {value!r:.60}")
            if not minimum <= value <= maximum:
                raise self.error(f"numbers in [{minimum}, {maximum}] in {name!r}, got {value!r:.60}")

    def texts(self, line: dict, name: str) -> list[str]:
        values = self.value(line, name, list)
        for value in values:
            if not isinstance(value, str):
                raise self.error(f"texts in {name!r}, got {value!r:.60}")
        return values

    def objects(self, line: dict, name: str, *keys: str) -> list[dict]:
        """The list ``line[name]`` of objects that hold ``keys`` and nothing else."""
        values = self.value(line, name, list)
        for value in values:
            if not isinstance(value, dict) or value.keys() != set(keys):
                raise self.error(f"objects with {', '.join(keys)} in {name!r}, got {value!r:.60}")
        return values

    def commits(self, line: dict, name: str) -> list[tuple[int, str]]:
        values = self.value(line, name, list)
        for value in values:
            is_pair = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
            if not is_pair or type(value[0]) is not int or value[0] < 0:
                raise self.error(f"[column, piece] in {name!r}, got {value!r:.60}")
        distinct = len({column for column, _ in values}) == len(values)
        self.expect(distinct, f"every column at most once in {name!r}")
        return [(column, piece) for column, piece in values]

    def expect(self, condition: object, expected: str) -> None:
        if not condition:
            raise self.error(expected)

    def error(self, expected: str) -> TraceError:
        return TraceError(f"{self.path}, line {self.number}: expected {expected}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _short(values: list) -> str:
    """A list with its first few items."""
    return repr(values) if len(values) <= 16 else f"{repr(values[:16])[:-1]}, ... ({len(values)} of them)]"


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond what a float holds")
    return value
