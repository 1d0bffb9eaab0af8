"""Names that have changed: the former ones work for one more release and say what they are called now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module


def warn_renamed(former: str, current: str, stacklevel: int = 3) -> None:
    """Warn the caller's caller that ``former`` is now called ``current``."""
    message = f"{former} is deprecated and will be removed in the next release, use {current}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def former_names(module: str, renamed: Mapping[str, str], stacklevel: int = 3) -> Callable[[str], object]:
    """A module's ``__getattr__`` that still finds the names it had before.

    Args:
        module: the module's ``__name__``.
        renamed: former name -> where it is now, such as ``entrgi.guidance.GuidanceOutput``.
        stacklevel: whose line the warning names; 3 is the one that asks for the name, where this is ``__getattr__``.
    """

    def find(name: str) -> object:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", renamed[name], stacklevel)
        home, _, current = renamed[name].rpartition(".")
        return getattr(import_module(home), current)

    return find
