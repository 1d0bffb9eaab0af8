"""The command line, one file per command; nothing heavy is imported before a command runs."""

import typer

from entrgi.cli import doctor, plan, profile, sample, view, vocabulary

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Reward-gradient guidance for masked diffusion language models."""


for _command in (sample.sample, view.view, profile.profile, plan.plan, vocabulary.vocabulary, doctor.doctor):
    app.command()(_command)
