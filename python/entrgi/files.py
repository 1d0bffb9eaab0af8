"""Files that appear whole or not at all, and files that grow by whole lines."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

_OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/self/fd/")  # a regular file behind these is somebody's open output
_LONGEST_SUFFIX = 16  # longer ones name no format, and would make temporary names too long
_umask_lock = Lock()


def check_target(option: str, path: Path) -> None:
    """Raise ValueError, naming ``option``, where no file can be made at ``path``; nothing is written.

    Devices and pipes may be written to; so may a regular file in a folder that takes a new one in its place.
    """
    shown = f"{option}: {str(path)!r}"
    try:
        target = path.resolve()
        mode = path.stat().st_mode if path.exists() or os.path.lexists(target) else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL
        raise ValueError(f"{shown} cannot be a file: {getattr(error, 'strerror', None) or error}") from error
    _check_name(shown, target)
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"{shown} is a folder, expected a file to write")
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise ValueError(f"{shown} is a socket or a disk, expected a file to write")
    if mode is not None and not os.access(path, os.W_OK):
        raise ValueError(f"{shown} cannot be written to")
    if _is_special(path):
        return
    if not target.parent.is_dir():
        raise ValueError(f"{option}: no folder {str(target.parent)!r} to write to")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: the folder {str(target.parent)!r} cannot be written to")


def _check_name(shown: str, target: Path) -> None:
    with suppress(OSError):  # no such folder, which is said later
        longest = os.pathconf(target.parent, "PC_NAME_MAX")
        if len(os.fsencode(target.name)) > longest:
            raise ValueError(f"{shown} has a name too long for a file, expected at most {longest} bytes")


def check_distinct(paths: Mapping[str, Path | None]) -> None:
    """Raise ValueError where two of ``paths``, by option, are one file; devices and pipes may be shared."""
    seen: dict[object, str] = {}
    for option, path in paths.items():
        if path is None or _is_special(path):
            continue
        identity: object = path.resolve()
        with suppress(OSError):  # two names of one file
            status = path.stat()
            identity = (status.st_dev, status.st_ino)
        if identity in seen:
            raise ValueError(f"{option}: {str(path)!r} is the file of {seen[identity]}, too; expected another")
        seen[identity] = option


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block ends, and is deleted when it raises.

    The new file has the suffix of ``path``, from which some writers tell the format, and gets the mode and the owner
    of the file that it replaces. Behind a symbolic link, what it points to is replaced. A device or a pipe stays what
    it is: the new file's bytes are written to it.
    """
    special = _is_special(path)
    target = path if special else path.resolve()
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    handle, name = tempfile.mkstemp(prefix=".entrgi-", suffix=suffix, dir=None if special else target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if special:
            _copy_into(temporary, target, "ab")
        else:
            _take_place(temporary, target)
    finally:  # Ctrl-C, too
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; a lone surrogate becomes its escape, which JSON reads back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` last beyond a loss of power, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_special(path: Path) -> bool:
    """Whether what is there is to be written into, not replaced."""
    try:
        return str(path).startswith(_OPEN_FILES) or not stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # nothing there
        return False


def _take_place(temporary: Path, target: Path) -> None:
    try:
        old = target.stat()
    except FileNotFoundError:
        mode = 0o666 & ~_umask()
    else:
        mode = stat.S_IMODE(old.st_mode)
        with suppress(OSError):  # only root may give files away
            os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, mode)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        os.replace(temporary, target)
    except OSError as error:
        # A mounted file, or one in a folder where only owners may rename, takes new contents alone.
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EXDEV) or not target.is_file():
            raise
        _copy_into(temporary, target, "wb")
    sync_folder(target.parent)


def _copy_into(source: Path, target: Path, mode: str) -> None:
    with source.open("rb") as reader, target.open(mode) as writer:
        shutil.copyfileobj(reader, writer)


def _umask() -> int:
    """Of the process; it can only be read by setting it."""
    with _umask_lock:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
