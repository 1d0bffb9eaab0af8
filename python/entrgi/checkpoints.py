"""Deprecated: see :mod:`entrgi.models.checkpoints`."""

import warnings

from entrgi.models import checkpoints


def __getattr__(name: str) -> object:
    value = getattr(checkpoints, name)
    warnings.warn("entrgi.checkpoints is deprecated, use entrgi.models.checkpoints", DeprecationWarning, stacklevel=2)
    return value
