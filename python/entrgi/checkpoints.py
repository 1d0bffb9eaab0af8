"""Deprecated: see :mod:`entrgi.models.checkpoints`."""

from entrgi.deprecation import warn_renamed
from entrgi.models import checkpoints


def __getattr__(name: str) -> object:
    value = getattr(checkpoints, name)
    warn_renamed("entrgi.checkpoints", "entrgi.models.checkpoints")
    return value
