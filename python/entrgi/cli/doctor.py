"""``entrgi doctor``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from entrgi.cli.console import check_json, console, reported_errors, write_json
from entrgi.cli.options import JSON_FILE, accepts


@accepts()
def doctor(json: Annotated[Path | None, JSON_FILE] = None) -> None:
    """Show what is installed and loaded, and what to do where something is missing. Exit code 1 then."""
    with reported_errors():
        check_json(json)

        from entrgi.cli.display import doctor_table
        from entrgi.doctor import examine

        report = examine()
        if not write_json(json, asdict(report)):
            console.print(doctor_table(report))
            console.print(report.advice, style="green" if report.healthy else "bold red")
        raise typer.Exit(0 if report.healthy else 1)
