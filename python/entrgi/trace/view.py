"""A trace as one HTML page that plays it. Nothing outside the file is loaded; the same trace gives the same page."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from entrgi.files import write_text
from entrgi.trace import Trace, lines

SCRIPTS = ("model.js", "colour.js", "text.js", "charts.js", "player.js")


def page(trace: Trace) -> str:
    """The page. Its address may name a place: ``#step=12&prompt=1&trajectory=3&colour=entropy&theme=dark``."""
    folder = files("entrgi.trace") / "viewer"
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    before, after_style = (folder / "page.html").read_text(encoding="utf-8").split("/*STYLE*/")
    between, after_data = after_style.split("/*TRACE*/")
    middle, after = after_data.split("/*SCRIPT*/")
    return "".join([before, style, between, embedded(trace), middle, script, after])


def embedded(trace: Trace) -> str:
    """The trace as JSON that can stand inside a script element: no text in it can end the element or open a comment."""
    text = json.dumps(list(lines(trace)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside JSON these characters occur in strings alone, where an escape means the same.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write(path: Path, trace: Trace) -> None:
    """Write the page as a whole: it appears, or replaces an older one, when all of it is there."""
    write_text(path, page(trace))
