"""Fused CPU and CUDA operators for reward-gradient guidance of masked diffusion language models.

Every public function is documented in :mod:`entrgi_ext.ops`; the operators themselves are
``torch.ops.entrgi.*``. The public names are those of ``__init__.pyi``, which type checkers read, too. They are imported
when first used, so that :mod:`entrgi_ext.plans` (launch plans, floors) and ``entrgi_ext._bindings`` (raw launchers),
which know no torch, can be imported without it.
"""

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    value = _load(name)
    globals()[name] = value  # found without this function from now on
    return value
