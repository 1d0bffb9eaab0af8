"""Names that have changed: the old one works for one more release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def warn_renamed(old: str, new: str) -> None:
    """Warn that ``old`` is called ``new`` by now, where code outside of this package uses it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "entrgi":
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=level)


def rename_option(options: dict[str, object], old: str, new: str) -> None:
    """Move ``options[old]``, if given, to ``new``, with a warning. Raises TypeError where both are given."""
    if old not in options:
        return
    if new in options:
        raise TypeError(f"got both {new}= and {old}=, which is its name from before, expected {new}= alone")
    warn_renamed(f"{old}=", f"{new}=")
    options[new] = options.pop(old)


def renamed_keyword(old: str, new: str) -> Callable[[Function], Function]:
    """A function that takes ``old=`` for ``new=``, with a warning."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*arguments: object, **options: object) -> object:
            rename_option(options, old, new)
            return function(*arguments, **options)

        return call

    return decorate
