"""Operations that make a CUDA device wait for the host, caught on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Values read on the host, shapes that depend on values, and tensors copied from the host. nonzero_static is none;
# of x[...] = 1, which is harmless, and torch.tensor(1, device=...), which is not, both are refused: use fill_.
_WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount"}
_WAITING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "lift_fresh"}


class NoHostReads(TorchDispatchMode):
    """Raises where a value goes from the device to the host or back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_count = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if by_mask or by_count or name in _WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
