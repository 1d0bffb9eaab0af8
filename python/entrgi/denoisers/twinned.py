"""What denoisers share that run a model through its twin."""

from __future__ import annotations

import torch

from entrgi.models.wrapping import Twin


class Twinned:
    """Where the user's model is, and of which dtype: asked each time, since both may change after it was wrapped."""

    _twin: Twin

    @property
    def device(self) -> torch.device:
        """Of the user's model, as it is now."""
        return self._twin.source.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the user's model, as it is now."""
        return self._twin.source.dtype
