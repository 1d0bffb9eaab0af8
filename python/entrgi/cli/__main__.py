"""``python -m entrgi.cli``."""

from entrgi.cli import app

app(prog_name="entrgi")
