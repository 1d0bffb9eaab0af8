"""Rounding the weights: 4 bits in groups while training, the shipped file format when packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

GROUP = 64
_LEVELS = 7


def quantize_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``[out, in]`` to integers -7..7 with one fp16 scale per ``GROUP`` inputs.

    Returns:
        int8 ``[out, in / GROUP, GROUP]`` and fp16 scales ``[out, in / GROUP, 1]``.
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / _LEVELS).clamp_min(1e-7).half()
    return (groups / scale.float()).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


@dataclass
class Rounding:
    """A switch shared by the layers of one ``fake_quantize_linears`` call."""

    enabled: bool = False


class _RoundedWeight(nn.Module):
    """Replace a weight by its 4-bit image; the gradient passes straight through."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.rounding.enabled:
            return weight
        integers, scale = quantize_groups(weight)
        rounded = (integers.float() * scale.float()).flatten(1)
        return weight + (rounded - weight).detach()


def fake_quantize_linears(module: nn.Module) -> Rounding:
    """Make every linear layer below ``module`` round its weights while the switch is on."""
    rounding = Rounding()
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", _RoundedWeight(rounding))
    return rounding


def settle(module: nn.Module) -> None:
    """End ``fake_quantize_linears``: the rounded weights become the weights."""
    for linear in [m for m in module.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def pack_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Store ``[rows, columns]`` as ``.int4`` and ``.scale`` (see ``entrgi.demo.weights``)."""
    integers, scale = quantize_groups(weight)
    biased = (integers + 8).flatten(1).to(torch.uint8)
    return {".int4": biased[:, 0::2] | (biased[:, 1::2] << 4), ".scale": scale[..., 0]}


def pack_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Store ``[rows, columns]`` as ``.int8`` and ``.scale``, one fp16 scale per row."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-7).half()
    integers = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {".int8": integers, ".scale": scale}
