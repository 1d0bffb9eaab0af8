"""Where commands print, and how their errors end them.

Exit codes: 0 for done, 1 for a failure (of a device, a disk, an installation), 2 for input that cannot be used; with
what was done kept, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP; 141 where the output's reader is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import typer
from rich.console import Console

from entrgi.files import check_target, write_text

BROKEN_PIPE = 128 + signal.SIGPIPE


class _Output(Console):
    """Standard output: when its reader is gone, there is nothing to say and nobody to say it to."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Errors(Console):
    """Standard error: work goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stderr)


console, errors = _Output(), _Errors(stderr=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, with the exit code that belongs to it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C, so that what is done is kept; whoever ignores them (nohup) goes on to."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors end the command as :func:`end_with` says; one that has something to show catches them before."""
    try:
        with signals_interrupt():
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
    except typer.Exit:  # a RuntimeError, too
        raise
    except BrokenPipeError as error:
        silence(sys.stdout)
        raise typer.Exit(BROKEN_PIPE) from error
    except (Exception, KeyboardInterrupt) as error:
        end_with(error, "interrupted before the first step")


def end_with(error: BaseException, interrupted: str, note: str | None = None) -> NoReturn:
    """End the command: an error is told in one line, and ``note`` in another; an interrupt as ``interrupted``."""
    code = code_of(error)
    if code is None:
        raise error
    if isinstance(error, KeyboardInterrupt):
        errors.print(interrupted, style="bold red")
        raise typer.Exit(code) from None
    print_error(error)
    if note is not None:
        errors.print(note, style="bold red")
    raise typer.Exit(code) from error


def code_of(error: BaseException) -> int | None:
    """The exit code of an error that is told in one line; None for what only a traceback explains."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    if isinstance(error, ValueError | OverflowError):
        return 2
    # ImportError: operators that are not built or do not load
    return 1 if isinstance(error, RuntimeError | ImportError | OSError | MemoryError) else None


def print_error(error: BaseException | str) -> None:
    """One line on standard error."""
    line = " ".join(str(error).split()) or type(error).__name__
    errors.print(f"error: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def check_json(target: Path | None) -> None:
    """Raise ValueError where the file of --json cannot be written; None and ``-``, standard output, are none."""
    if target is not None and str(target) != "-":
        check_target("--json", target)


def write_json(target: Path | None, data: dict[str, Any]) -> bool:
    """One JSON object to a file, to standard output where ``target`` is ``-``, or, None, nowhere.

    Returns whether standard output has it, where nothing else is to be shown then.
    """
    if target is None:
        return False
    text = json.dumps(data, allow_nan=False)
    if str(target) == "-":
        print(text, flush=True)
        return True
    write_text(target, text + "\n")
    return False


def tolerant_streams() -> None:
    """What the terminal's encoding lacks is shown as its escape, whatever a model writes."""
    for stream in cast(Any, (sys.stdout, sys.stderr)):
        with suppress(AttributeError, OSError, ValueError):  # closed, or not the interpreter's own
            stream.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Send what is still to be flushed nowhere: the interpreter would complain at its exit."""
    with suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
