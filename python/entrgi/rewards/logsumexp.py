"""The normaliser of a language model's logits, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at once: 2^26 in fp32 are 256 MiB.
_CHUNK = 2**26


class LogSumExp(torch.autograd.Function):
    """logsumexp over ids of ``cap(hidden @ weight.T)``, [...] of hidden [..., h], without keeping the logits.

    The gradient, softmax(logits) @ weight (times cap' where there is a soft cap), is computed on the way forward,
    while a chunk's logits exist: [.., h] is kept instead of [.., V].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        values, gradients = [], []
        for chunk in flat.split(max(1, _CHUNK // weight.shape[0])):
            logits = (chunk @ weight.T).to(precise)
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits, slope = softcap * bent, 1 - bent * bent
            value = logits.logsumexp(dim=-1)
            values.append(value)
            if ctx.needs_input_grad[0]:
                share = (logits - value[:, None]).exp_()
                share = share if slope is None else share * slope
                gradients.append(share.to(weight.dtype) @ weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).view(hidden.shape))
        return torch.cat(values).view(hidden.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient[..., None] * slope).to(slope.dtype), None, None
