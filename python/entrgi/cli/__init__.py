"""The command line, one file per command; nothing heavy is imported before a command runs."""

from importlib import metadata
from typing import Annotated

import typer

from entrgi.cli import doctor, plan, profile, sample, view, vocabulary
from entrgi.cli.commands import Command, Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print(f"entrgi {metadata.version('entrgi')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Reward-gradient guidance for masked diffusion language models."""


for _command in (sample.sample, view.view, profile.profile, plan.plan, vocabulary.vocabulary, doctor.doctor):
    app.command(cls=Command)(_command)
