"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(option: str, path: Path) -> None:
    """Raise ValueError, naming ``option``, where no file can be made at ``path``; nothing is written."""
    if path.is_dir():
        raise ValueError(f"{option}: {str(path)!r} is a folder, expected a file to write")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{option}: no folder {str(path.resolve().parent)!r} to write to")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"{option}: the folder {str(path.resolve().parent)!r} cannot be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block ends, and is deleted when it raises.

    The new file has the suffix of ``path``, from which some writers tell the format.
    """
    target = path.resolve()  # behind a symbolic link, what it points to is replaced
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C, too
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; a lone surrogate becomes its escape, which JSON reads back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
