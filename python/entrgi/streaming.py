"""Text as it is finished: the response's ids in order, handed to a streamer while generation goes on."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from entrgi.generation import Generation


class Streamer(Protocol):
    """What transformers' ``TextStreamer`` and its like offer."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt's ids, [1, n], then the response's in order, [n]."""
        ...

    def end(self) -> None:
        """No more will come."""
        ...


class Stream:
    """Hands a streamer the part of the only response before its first masked position, as it grows.

    As a context it ends the streamer once, whatever happens: who reads it in another thread would wait for ever.
    """

    def __init__(self, streamer: Streamer | None) -> None:
        self.streamer, self.sent = streamer, 0
        self.generation: Generation | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if callable(getattr(self.streamer, "end", None)):
            with suppress(Exception):  # the first error is the one to know
                self.end()

    def start(self, generation: Generation) -> None:
        """Hand over the prompt. Raises ValueError for what is no streamer, and for several trajectories."""
        self.generation = generation
        if self.streamer is None:
            return
        if not all(callable(getattr(self.streamer, name, None)) for name in ("put", "end")):
            raise ValueError(f"streamer must have methods put and end, got {self.streamer!r}")
        if generation.seeds.numel() != 1:
            raise ValueError(f"streamer: expected one trajectory, got {generation.seeds.numel()}")
        self.streamer.put(generation.sequences.tokens[:, : generation.layouts[0].start].cpu())

    def update(self) -> None:
        if self.streamer is None or self.generation is None:
            return
        response = self.generation.window_ids(0, self.generation.sequences.tokens[0].tolist())
        mask = self.generation.denoiser.mask_token_id
        ready = response.index(mask) if mask in response else len(response)
        if ready > self.sent:
            self.streamer.put(torch.tensor(response[self.sent : ready]))
            self.sent = ready

    def end(self) -> None:
        if self.streamer is not None:
            streamer, self.streamer = self.streamer, None
            streamer.end()
