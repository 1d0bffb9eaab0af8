"""How the command line reads its arguments: errors in one line, options whose value may be left out."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from entrgi.cli.console import BROKEN_PIPE, print_error, silence, tolerant_streams

JSON = "--json"  # its value is a file; standard output where it is left out

# typer brings click's exceptions, some versions as their own.
UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class Command(TyperCommand):
    """A command whose ``--json`` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value = {flag for each in self.params if not getattr(each, "is_flag", True) for flag in each.opts}
        given, is_value = [], False
        for place, argument in enumerate(args):
            given.append(argument)
            following = args[place + 1 : place + 2]
            stands_alone = not following or (following[0] != "-" and following[0].startswith("-"))
            if argument == JSON and stands_alone and not is_value:
                given.append("-")
                continue
            is_value = not is_value and argument in takes_value
        return super().parse_args(ctx, given)


class Commands(TyperGroup):
    """The group of all commands; its errors are one line, as those of the commands themselves."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> object:
        tolerant_streams()
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                print_error(error.format_message())
            code = error.exit_code
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except BrokenPipeError:
            silence(sys.stdout)
            code = BROKEN_PIPE
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):  # which has been told
            silence(sys.stdout)
        sys.exit(code if isinstance(code, int) else 0)
