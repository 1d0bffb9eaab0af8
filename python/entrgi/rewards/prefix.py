"""A causal model's prefix, computed once: keys and values that every later pass attends to.

What stands before the response needs no gradient and does not see the response, so its keys and values are the
same for all Adam iterations, all denoising steps and all K trajectories of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Prefix:
    """The prefixes of B prompts, padded on the left to a common length T.

    So what follows is as far from every key as it would be without padding, which windows of attention go by.

    Attributes:
        keys, values: of every layer, [B, H, T, head size] each; rows of padding hold numbers that nothing sees.
        valid: bool [B, T], real positions.
        last: [B, h], hidden state of each prefix's last position; meaningless where a prefix is empty.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    last: Tensor


class RecordingCache(Cache):
    """Keeps the keys and values of one pass, whole: a library cache of a sliding layer would drop the oldest."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, queries: int | Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return _length(queries), 0


class PrefixCache(Cache):
    """Puts a :class:`Prefix` before the keys and values of one pass, and keeps nothing of that pass.

    A library cache grows with every pass; used twice, it would attend to the first pass's response as well,
    without an error.

    Args:
        prefix: of B prompts.
        prompt: int64 [A], the prompt of each trajectory.
        num_trajectories: K, where the A trajectories are all B * K; None after a selection.
    """

    def __init__(self, prefix: Prefix, prompt: Tensor, num_trajectories: int | None) -> None:
        super().__init__(layers=[])
        self.prefix, self.prompt, self.num_trajectories = prefix, prompt, num_trajectories

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            self._joined(self.prefix.keys[layer_idx], key_states),
            self._joined(self.prefix.values[layer_idx], value_states),
        )

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.prefix.valid.shape[1]

    def get_mask_sizes(self, queries: int | Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.get_seq_length() + _length(queries), 0

    def _joined(self, kept: Tensor, new: Tensor) -> Tensor:
        if kept.shape[0] == 1:
            return torch.cat([kept.expand(new.shape[0], -1, -1, -1), new], dim=-2)
        if self.num_trajectories is None:
            return torch.cat([kept[self.prompt], new], dim=-2)
        # Every prompt's copies beside each other: one copy from the shared storage, not two.
        prompts, count = kept.shape[0], self.num_trajectories
        shared = kept[:, None].expand(-1, count, -1, -1, -1)
        return torch.cat([shared, new.unflatten(0, (prompts, count))], dim=-2).flatten(0, 1)


def _length(queries: int | Tensor) -> int:
    """How many there are; transformers 4 gives their positions."""
    return queries.shape[0] if isinstance(queries, Tensor) else queries


@torch.no_grad()
def compute_prefix(body: PreTrainedModel, inputs_embeds: Tensor, lengths: Tensor) -> Prefix:
    """Run ``body`` over the prefixes.

    Args:
        body: the transformer without its head.
        inputs_embeds: [B, T, d], padded on the right.
        lengths: int64 [B].
    """
    index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    column = index - (inputs_embeds.shape[1] - lengths)[:, None]
    valid, positions = column >= 0, column.clamp_min(0)
    cache = RecordingCache()
    hidden = body(
        inputs_embeds=inputs_embeds.gather(1, positions[..., None].expand_as(inputs_embeds)),
        attention_mask=valid.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    layers = range(len(cache.keys))
    return Prefix(
        keys=[cache.keys[i] for i in layers],
        values=[cache.values[i] for i in layers],
        valid=valid,
        last=hidden[:, -1],
    )
