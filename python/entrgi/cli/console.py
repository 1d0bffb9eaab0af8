"""Where commands print, and how their errors end them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

console, errors = Console(), Console(stderr=True)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors of the user's input end the command with one line and exit code 2, failures with 1.

    Ctrl-C exits with 130; a command that has something to show catches it before.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError, too
        raise
    except KeyboardInterrupt:
        errors.print("interrupted before the first step", style="bold red")
        raise typer.Exit(130) from None
    except ValueError as error:
        print_error(error)
        raise typer.Exit(2) from error
    except (RuntimeError, ImportError, OSError) as error:  # ImportError: operators that are not built or do not load
        print_error(error)
        raise typer.Exit(1) from error


def print_error(error: Exception) -> None:
    """One line on standard error."""
    line = " ".join(str(error).split())
    errors.print(f"error: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
