"""``entrgi doctor``."""

from __future__ import annotations

import typer

from entrgi.cli.console import console


def doctor() -> None:
    """Show what is installed and loaded, and what to do where something is missing. Exit code 1 then."""
    from entrgi.display import doctor_table
    from entrgi.doctor import examine

    report = examine()
    console.print(doctor_table(report))
    console.print(report.advice, style="green" if report.healthy else "bold red")
    raise typer.Exit(0 if report.healthy else 1)
