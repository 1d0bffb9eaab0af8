"""Loads the operator libraries and tells torch what C++ cannot: fakes and autograd.

Importing this module loads ``libentrgi_cpu.so`` (schemas and CPU kernels; an :class:`ImportError` where it is
missing) and, under a torch that has CUDA, ``libentrgi_cuda.so`` (where that fails the reason is kept for
:func:`loaded_libraries`, and the CPU operators work without it).
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import torch

from . import autograd, fakes

MINIMUM_TORCH = (2, 10)
_FOLDER = Path(__file__).parent
_problems: dict[str, str | None] = {}


def loaded_libraries() -> dict[str, str | None]:
    """``{"cpu": None, "cuda": None}`` where both libraries are loaded; otherwise, in place of None, why not."""
    return dict(_problems)


def _load(device: str) -> None:
    torch.ops.load_library(str(_FOLDER / f"libentrgi_{device}.so"))
    _problems[device] = None


def _load_libraries() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < MINIMUM_TORCH:
        raise ImportError(f"entrgi_ext needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.__version__}")
    if not (_FOLDER / "libentrgi_cpu.so").exists():
        raise ImportError(
            f"entrgi_ext is not built: libentrgi_cpu.so is missing from {_FOLDER}; "
            "install the package (pip install .) or run `make build` in a source tree"
        )
    try:
        _load("cpu")
    except OSError as error:
        raise ImportError(
            f"libentrgi_cpu.so does not load under torch {torch.__version__}: {error}; rebuild the package"
        ) from error

    if torch.version.cuda is None:
        _problems["cuda"] = f"torch {torch.__version__} is built without CUDA"
    elif not (_FOLDER / "libentrgi_cuda.so").exists():
        _problems["cuda"] = "libentrgi_cuda.so was not built (no nvcc at build time, or ENTRGI_CUDA=0)"
    else:
        try:
            _load("cuda")
            if os.environ.get("ENTRGI_FORCE_PLAN"):
                import_module(".plans", __package__)  # which reads it
        except (OSError, RuntimeError) as error:
            _problems["cuda"] = str(error)


_load_libraries()
fakes.register()
autograd.register()
