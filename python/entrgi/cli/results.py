"""The file of finished prompts: one a line, on the disk as soon as it is finished; a later run goes on from it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrgi.files import sync_folder

if TYPE_CHECKING:
    from entrgi.prompts import Prompt

Settings = dict[str, Any]


class Results:
    """Lines of JSON with a prompt's ``index``, the ``settings`` it was made with, and its ``runs`` by name.

    Args:
        path: the file; a pipe or a device is written to.
        resume: whether the file may hold prompts already.

    Raises:
        ValueError: where it does and ``resume`` is false, and where it is no file of such lines.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.lines, self.length = path, [], 0
        exists = path.exists()
        self.regular = not exists or stat.S_ISREG(path.stat().st_mode)
        if resume and not self.regular:
            raise ValueError(f"--resume: {str(path)!r} is not a regular file, which cannot be read again")
        if not (exists and self.regular and path.stat().st_size):
            return
        if not resume:
            raise ValueError(f"--output: {str(path)!r} exists; pass --resume to go on with it, or name another file")
        data = path.read_bytes()
        self.length = data.rfind(b"\n") + 1  # behind it, a line that was cut off
        for number, line in enumerate(data[: self.length].split(b"\n")[:-1], 1):
            self.lines.append(self._line(number, line))

    @property
    def seed(self) -> int | None:
        """The seed that its prompts were made with."""
        known = self.lines[0]["settings"].get("seed") if self.lines else None
        return None if known is None else int(known)

    def done(self, prompts: list[Prompt], settings: list[Settings]) -> set[int]:
        """Which of the prompts the file holds.

        Args:
            settings: those of each prompt.

        Raises:
            ValueError: for a line of another prompt or of other settings, naming it and the difference.
        """
        for number, line in enumerate(self.lines, 1):
            index = line["index"]
            place = f"--resume: {str(self.path)!r}, line {number}"
            if index >= len(prompts):
                raise ValueError(f"{place} is of prompt number {index}, expected one below {len(prompts)}")
            if line["prompt"] != prompts[index]:
                raise ValueError(f"{place} is of the prompt {line['prompt']!r:.60}, expected {prompts[index]!r:.60}")
            for name, expected in json.loads(json.dumps(settings[index])).items():
                found = line["settings"].get(name)
                if found != expected:
                    raise ValueError(f"{place} was made with {_difference(name, found, expected)}")
        return {line["index"] for line in self.lines}

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append finished prompts, which last from here on."""
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode("ascii")
        with self.path.open("r+b" if self.regular and self.path.exists() else "ab") as file:
            if self.regular:
                file.truncate(self.length)
                file.seek(self.length)
            file.write(data)
            file.flush()
            if self.regular:
                os.fsync(file.fileno())
        if not self.length:
            sync_folder(self.path.resolve().parent)
        self.length += len(data)

    def _line(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line: Any = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not (isinstance(line, dict) and isinstance(line.get("settings"), dict) and _is_place(line.get("index"))):
            raise ValueError(
                f"--resume: {str(self.path)!r}, line {number}: expected a finished prompt of `entrgi sample --output`, "
                f"got {text[:60].decode(errors='backslashreplace')!r}"
            )
        return line


def _is_place(index: object) -> bool:
    return type(index) is int and index >= 0


def _difference(name: str, found: object, expected: object) -> str:
    """The first place at which two settings differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                return _difference(f"{name}.{key}", found.get(key), expected.get(key))
    return f"{name} {found!r:.60}, expected {expected!r:.60}"
