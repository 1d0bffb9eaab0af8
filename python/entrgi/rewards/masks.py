"""Which positions of a reward's text are visible."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from entrgi.sequences import holds_any


def attention_mask(
    tokens: Tensor,
    valid: Tensor,
    response: Tensor,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> Tensor:
    """What the reward model attends to, bool [P, S]: real positions but the response's end.

    Masked are response positions after the first end-of-sequence token (one id, or the first of several), and those
    that hold the padding token. Where the two are one id (Dream), the first one is masked too, as published.

    Args:
        tokens: int64 [P, S], committed ids, argmax z at masked positions.
        valid: bool [P, S], real positions.
        response: bool [P, S], positions of the response.
    """
    hidden = torch.zeros_like(valid)
    ends: Any = (eos_token_id,) if isinstance(eos_token_id, Integral) else eos_token_id
    if ends:
        is_eos = (response & holds_any(tokens, ends)).long()
        hidden = is_eos.cumsum(dim=1) > is_eos  # an earlier one exists
    if pad_token_id is not None:
        hidden = hidden | (tokens == pad_token_id)
    return valid & ~(hidden & response)
