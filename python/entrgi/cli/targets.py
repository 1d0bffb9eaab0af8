"""The files that a command is to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrgi.cli.prompts import STDIN
from entrgi.files import check_distinct, check_target


@dataclass(frozen=True)
class Files:
    """What is to be written besides the texts."""

    json: Path | None = None
    trace: Path | None = None
    plot: Path | None = None
    output: Path | None = None
    resume: bool = False

    @property
    def of_steps(self) -> bool:
        return self.trace is not None or self.plot is not None

    @property
    def json_is_shown(self) -> bool:
        return self.json is not None and str(self.json) == STDIN

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise, before anything is generated, where a file cannot be written or is another option's, too.

        ``options`` are the values of :data:`~entrgi.cli.prompts.PROMPTS`' options, by name, among others.
        """
        from entrgi.trace import plot

        if self.resume and self.output is None:
            raise ValueError("--resume: expected the file to go on with as --output")
        written = {"--output": self.output, "--json": self.json, "--trace": self.trace, "--plot": self.plot}
        written = {option: path for option, path in written.items() if path is not None and str(path) != STDIN}
        for option, path in written.items():
            check_target(option, path)
        read = {"--prompts-file": options["prompts_file"], "--messages": options["messages"]}
        for option, path in read.items():
            check_distinct({option: None if path is None or str(path) == STDIN else path, **written})
        if self.plot is not None:
            plot.check(self.plot, "--plot")
