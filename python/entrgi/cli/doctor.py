"""``entrgi doctor``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from entrgi.cli.console import check_json, console, reported_errors, write_json
from entrgi.cli.options import JSON_FILE, accepts

if TYPE_CHECKING:
    from entrgi.doctor import Report


@accepts()
def doctor(json: Annotated[Path | None, JSON_FILE] = None) -> None:
    """Show what is installed and loaded, and what to do where something is missing. Exit code 1 then."""
    with reported_errors():
        check_json(json)

        from entrgi.doctor import examine

        report = examine()
        if not write_json(json, asdict(report)):
            console.print(table(report))
            console.print(report.advice, style="green" if report.healthy else "bold red")
        raise typer.Exit(0 if report.healthy else 1)


def table(report: Report) -> Table:
    """Two columns: what, and what was found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.facts.items():
        table.add_row(name, value)
    return table
