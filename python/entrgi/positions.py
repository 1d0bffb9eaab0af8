"""The masked positions that a step works on: the rows of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrgi.schedule import Batch, Step
from entrgi.sequences import Sequences


@dataclass(frozen=True)
class MaskedPositions:
    """The N masked positions that a batch works on, padded to a multiple of the row bucket.

    Padding repeats the first row: a denoiser may give anything, NaN included, where nothing is masked.

    Attributes:
        trajectories, columns: int64 [N], of the batch's tokens [A, S].
        keys: int64 [N, 4], (seed, denoising step, 0, column).
        real: bool [N], false in padding rows.
    """

    trajectories: Tensor
    columns: Tensor
    keys: Tensor
    real: Tensor

    def keys_of(self, draw: int) -> Tensor:
        """``keys`` of another draw, int64 [N, 4]."""
        keys = self.keys.clone()
        keys[:, 2].fill_(draw)
        return keys


def masked_positions(sequences: Sequences, step: Step, batch: Batch, mask_token_id: int, size: int) -> MaskedPositions:
    """Masked positions of a batch, row-major by trajectory, padded to ``size`` rows.

    Their number is known from the schedule, so the device is not asked for it.
    """
    masked = sequences.tokens == mask_token_id
    if sequences.attention_mask is not None:
        masked &= sequences.attention_mask.bool()
    if not step.guided:  # nobody reads the logits of what does not compete
        masked &= masked.cumsum(dim=1) <= batch.competing[:, None]
    real = torch.arange(size, device=masked.device) < batch.rows
    positions = torch.nonzero_static(masked, size=size, fill_value=0)
    trajectories, columns = torch.where(real[:, None], positions, positions[:1]).unbind(dim=1)
    zero = torch.zeros_like(columns)
    keys = torch.stack([sequences.seeds[trajectories], zero + step.index, zero, columns], dim=1)
    return MaskedPositions(trajectories, columns, keys, real)
