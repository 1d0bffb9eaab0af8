"""Reward-gradient guidance for masked diffusion language models.

The public names are those of ``__init__.pyi``, which type checkers read, too. They load on first use, so that
``entrgi doctor`` can report an installation whose operators do not load.
"""

from importlib import metadata

import lazy_loader

from entrgi.deprecation import former_names

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_former = former_names(__name__, {"GuidanceTrace": "entrgi.guidance.GuidanceOutput"})


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version("entrgi")
    return _load(name) if name in __all__ else _former(name)
