"""From a file to its trace, every line checked."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from entrgi.trace.schema import FORMAT, VERSION, Result, Run, Trace, TracedPrompt, TraceStep, TrajectoryStep


class TraceError(ValueError):
    """A file is not a trace: the message names the file, the line, and what was expected there."""


def read(path: Path) -> Trace:
    """Read and check a file.

    Raises:
        TraceError: naming the file, the line, and what was expected there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TraceError(f"no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: not readable as a trace: {error}") from error
    return _Reader(path, text).trace()


class _Reader:
    """Lines of a file in turn, with the place for messages."""

    def __init__(self, path: Path, text: str) -> None:
        # Not splitlines: a piece may hold characters that it takes for line ends.
        self.path, self.rows, self.number = path, text.removesuffix("\n").split("\n"), 0

    def trace(self) -> Trace:
        header = self.line("header")
        found = (header.get("format"), header.get("version"))
        self.expect(found[0] == FORMAT, f"the format {FORMAT!r}, got {found[0]!r}")
        self.expect(found[1] == VERSION, f"version {VERSION}, got {found[1]!r}")
        prompts = [
            TracedPrompt(prompt["prompt"], self.integer(prompt, "width", 1), self.commits(prompt, "given"))
            for prompt in self.objects(header, "prompts", "prompt", "width", "given")
        ]
        copies = self.integer(header, "copies", 1)
        names = [(run["name"], run["config"]) for run in self.objects(header, "runs", "name", "config")]
        self.expect(bool(prompts) and bool(names), "at least one prompt and one run")
        source, special = self.value(header, "source", dict), self.value(header, "special", list)
        runs = [self.run(name, config, prompts, copies) for name, config in names]
        self.number += 1
        self.expect(self.number > len(self.rows), "the end of the file after the last run's end")
        return Trace(source, special, prompts, copies, runs)

    def run(self, name: str, config: dict, prompts: list[TracedPrompt], copies: int) -> Run:
        steps: list[TraceStep] = []
        masked = {(b, k): self.holes(prompt) for b, prompt in enumerate(prompts) for k in range(copies)}
        line = self.line("step", "end", run=name)
        while line["kind"] == "step":
            index = self.integer(line, "step", steps[-1].step + 1 if steps else 0)
            names = [field.name for field in fields(TrajectoryStep)]
            parts = [self.part(part, masked) for part in self.objects(line, "trajectories", *names)]
            steps.append(TraceStep(index, self.value(line, "seconds", float), parts))
            line = self.line("step", "end", run=name)
        results = []
        for result in self.objects(line, "results", *(field.name for field in fields(Result))):
            lengths = {len(self.value(result, field.name, list)) for field in fields(Result)}
            self.expect(lengths == {copies}, f"results with {copies} trajectories")
            results.append(Result(**{field.name: result[field.name] for field in fields(Result)}))
        self.expect(len(results) == len(prompts), f"results of {len(prompts)} prompts, got {len(results)}")
        complete = self.value(line, "complete", bool)
        return Run(name, config, steps, complete, results, self.value(line, "seconds", float))

    def part(self, part: dict, masked: dict[tuple[int, int], list[int]]) -> TrajectoryStep:
        key = (part["prompt"], part["trajectory"])
        self.expect(key in masked, f"a prompt and a trajectory of the header, got {list(key)}")
        commits = self.commits(part, "commits")
        columns = self.value(part, "columns", list)
        self.expect(columns == masked[key], f"columns {masked[key]}, those still masked, got {columns}")
        for name in ("entropy", "weight"):
            if name == "weight" and part[name] is None:
                continue
            values = self.value(part, name, list)
            self.expect(len(values) == len(columns), f"one {name} for each of {len(columns)} columns")
            self.expect(all(x is None or _is_real(x) for x in values), f"numbers or null in {name!r}")
        self.expect(part["reward"] is None or _is_real(part["reward"]), "a number or null as 'reward'")
        done = {column for column, _ in commits}
        wrong = sorted(done - set(columns))
        self.expect(not wrong, f"commits to masked columns, got {wrong}")
        masked[key] = [column for column in columns if column not in done]
        return TrajectoryStep(**{**part, "commits": commits})

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
            line = json.loads(row, parse_constant=_refuse)
        except ValueError as error:
            raise self.error(f"a line of JSON, got {row[:60]!r} ({error})") from error
        self.expect(isinstance(line, dict), f"a JSON object, got {row[:60]!r}")
        found = (line.get("kind"), line.get("run"))
        self.expect(found[0] in kinds and found[1] == run, f"a line of kind {wanted}, got {found[0]!r} of {found[1]!r}")
        return line

    def value(self, line: dict, name: str, kind: type) -> object:
        value = line.get(name)
        fits = _is_real(value) if kind is float else isinstance(value, kind)
        self.expect(fits, f"{name!r} to be of type {kind.__name__}, got {value!r:.60}")
        return value

    def integer(self, line: dict, name: str, minimum: int) -> int:
        value = line.get(name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        self.expect(fits, f"{name!r} to be an integer >= {minimum}, got {value!r:.60}")
        return value

    def objects(self, line: dict, name: str, *keys: str) -> list[dict]:
        """The list ``line[name]`` of objects that hold ``keys`` and nothing else."""
        values = self.value(line, name, list)
        for value in values:
            fits = isinstance(value, dict) and value.keys() == set(keys)
            self.expect(fits, f"objects with {', '.join(keys)} in {name!r}, got {value!r:.60}")
        return values

    def commits(self, line: dict, name: str) -> list[tuple[int, str]]:
        values = self.value(line, name, list)
        for value in values:
            fits = isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)
            self.expect(fits and isinstance(value[1], str), f"[column, piece] in {name!r}, got {value!r:.60}")
        return [(column, piece) for column, piece in values]

    def expect(self, condition: bool, expected: str) -> None:
        if not condition:
            raise self.error(expected)

    def error(self, expected: str) -> TraceError:
        return TraceError(f"{self.path}, line {self.number}: expected {expected}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
