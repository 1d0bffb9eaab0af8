"""``python -m entrgi``."""

from entrgi.cli import app

app(prog_name="entrgi")
