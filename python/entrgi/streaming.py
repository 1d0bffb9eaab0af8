"""Text as it is finished: the response's ids in order, handed to a streamer while generation goes on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from entrgi.task import Task


class Streamer(Protocol):
    """What transformers' ``TextStreamer`` and its like offer."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt's ids, [1, n], then the response's in order, [n]."""
        ...

    def end(self) -> None:
        """No more will come."""
        ...


class Stream:
    """Hands a streamer the part of the only response before its first masked position, as it grows."""

    def __init__(self, streamer: Streamer | None, task: Task) -> None:
        self.streamer, self.task, self.sent = streamer, task, 0
        if streamer is None:
            return
        if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
            raise ValueError(f"streamer must have methods put and end, got {streamer!r}")
        if task.seeds.numel() != 1:
            raise ValueError(f"streamer: expected one trajectory, got {task.seeds.numel()}")
        streamer.put(task.sequences.tokens[:, : task.layouts[0].start].cpu())

    def update(self) -> None:
        if self.streamer is None:
            return
        response = self.task.window_ids(0, self.task.sequences.tokens[0].tolist())
        mask = self.task.denoiser.mask_token_id
        ready = response.index(mask) if mask in response else len(response)
        if ready > self.sent:
            self.streamer.put(torch.tensor(response[self.sent : ready]))
            self.sent = ready

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
