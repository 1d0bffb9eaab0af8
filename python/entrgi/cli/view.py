"""``entrgi view``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entrgi.cli.console import console, reported_errors


def view(
    trace: Annotated[Path, typer.Argument(help="File written by `entrgi sample --trace`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write. Default: the trace's name with .html.")
    ] = None,
) -> None:
    """Make one HTML page, which needs no network, that plays the denoising of a trace."""
    from entrgi import view as viewer
    from entrgi.files import check_target
    from entrgi.trace import read

    with reported_errors():
        target = trace.with_suffix(".html") if output is None else output
        if target.resolve() == trace.resolve():
            raise ValueError(f"--output: {str(target)!r} is the trace itself, expected another file")
        check_target("--output", target)
        viewer.write(target, read(trace))
        console.print(str(target), markup=False, highlight=False, soft_wrap=True)
