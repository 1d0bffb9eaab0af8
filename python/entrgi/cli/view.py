"""``entrgi view``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entrgi.cli.console import console, reported_errors
from entrgi.cli.options import Option, accepts, checked
from entrgi.files import check_target


@accepts()
def view(
    trace: Annotated[
        Path,
        typer.Argument(help="File written by `entrgi sample --trace`.", show_default=False, **checked("TRACE", Path)),
    ],
    output: Annotated[
        Path | None, Option(help="Page to write. Default: the trace's name with .html.", short="-o")
    ] = None,
) -> None:
    """Make one HTML page, which needs no network, that plays the denoising of a trace."""
    from entrgi.trace import read
    from entrgi.trace import view as viewer

    with reported_errors():
        target = page_of(trace) if output is None else output
        check_target("--output", target)
        if is_same(target, trace):
            raise ValueError(f"--output: {str(target)!r} is the trace itself, expected another file")
        viewer.write(target, read(trace))
        console.print(str(target), markup=False, highlight=False, soft_wrap=True)


def page_of(trace: Path) -> Path:
    """The trace's name with another ending. Raises ValueError for what has no such name, as pipes have."""
    if not trace.name or not (trace.is_file() or not trace.exists()):
        raise ValueError(f"--output: expected the page to write, since {str(trace)!r} is no file with a name for it")
    return trace.with_suffix(".html")


def is_same(target: Path, trace: Path) -> bool:
    """Whether two paths are one regular file."""
    if target.is_file() and trace.is_file():
        return target.samefile(trace)
    return not target.exists() and target.resolve() == trace.resolve()
