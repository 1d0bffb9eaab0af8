"""Names that have changed: the former ones work for one more release and say what they are called now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])


def warn_renamed(former: str, current: str) -> None:
    """Warn that ``former`` is now called ``current``, at the line outside of entrgi and torch that says it."""
    message = f"{former} is deprecated and will be removed in the next release, use {current}"
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("entrgi", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def former_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], object]:
    """A module's ``__getattr__`` that still finds the names it had before.

    Args:
        module: the module's ``__name__``.
        renamed: former name -> where it is now, such as ``entrgi.guidance.GuidanceOutput``.
    """

    def find(name: str) -> object:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", renamed[name])
        home, _, current = renamed[name].rpartition(".")
        return getattr(import_module(home), current)

    return find


def rename_option(options: dict[str, Any], former: str, current: str) -> None:
    """Move ``options[former]``, if given, to ``current``, with a warning where code outside of this package says it.

    Raises:
        TypeError: where both are given.
    """
    if former not in options:
        return
    if current in options:
        raise TypeError(f"got both {current}= and {former}=, which is its former name, expected {current}= alone")
    warn_renamed(f"{former}=", f"{current}=")
    options[current] = options.pop(former)


def renamed_keyword(former: str, current: str) -> Callable[[Function], Function]:
    """A function that takes ``former=`` for ``current=``, with a warning."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> object:
            rename_option(options, former, current)
            return function(*arguments, **options)

        return cast(Function, call)

    return decorate
