"""Devices and dtypes as people write them."""

from __future__ import annotations

import torch


def choose_device(label: str, device: str | int | torch.device | None) -> torch.device | None:
    """The device meant by a name, an index (``0`` is ``cuda:0``) or a device; None stays None.

    Args:
        label: the beginning of an error, such as ``denoiser: device``.

    Raises:
        ValueError: for anything else, and for a device that is not there.
    """
    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ValueError(f"{label} {device!r} is none, expected cpu, cuda, cuda:1 ... or an index")
    if isinstance(device, str) and device.isdecimal():
        device = int(device)
    try:
        # A memory on the device, not just its name: some names stand for nothing that is there.
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).splitlines()[0].split(". ")[0].split())
        raise ValueError(
            f"{label} {device!r} cannot be used, expected cpu, cuda, cuda:1 ... or an index: {reason}"
        ) from error


def choose_dtype(argument: str, dtype: str | torch.dtype | None, name: str = "dtype") -> torch.dtype | None:
    """The floating dtype meant by ``torch.bfloat16``, ``"bfloat16"`` or ``"torch.bfloat16"``.

    None and ``"auto"`` are None. ``name`` is what the error calls it. Raises ValueError for anything else.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    chosen = dtype
    if isinstance(dtype, str):
        chosen = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"{argument}: {name} is {dtype!r}, expected a floating dtype such as torch.bfloat16")
    return chosen
