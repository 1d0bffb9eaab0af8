"""No reward: texts are written unguided, and nobody judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entrgi.prompts import Completion


class NoReward:
    """Stands for ``reward=None`` in an unguided generation: every text's reward is NaN."""

    reads_prompt = True

    def bind(self, *_arguments: object) -> None:
        """Nothing is bound: nobody asks for a gradient."""

    def score(self, completions: Sequence[Completion]) -> Tensor:
        """NaN for each, fp32 [n]."""
        return torch.full((len(completions),), torch.nan)
