"""Hidden states of a causal transformer over input embeddings, with or without a kept prefix."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrgi.rewards.masks import prepared_masks
from entrgi.rewards.prefix import Prefix, PrefixCache, compute_prefix
from entrgi.rewards.sequences import RewardSequences


class CausalBackbone:
    """The transformer of a causal model without its head.

    Args:
        model: with a head, which is not run.

    Attributes:
        reuses_prefix: a prefix can be kept. Where the model's masks cannot be prepared (see
            :mod:`entrgi.rewards.masks`), every pass reads the whole sequence instead, and the model
            inspects its mask on the host.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Gemma 3 in transformers 4 misnames its own: base_model is then the model, head and all.
        self.model = model.get_decoder() if model.base_model is model else model.base_model
        self.masks = prepared_masks(model)
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.reuses_prefix = self.masks is not None and self.takes_positions

    def prefix(self, inputs_embeds: Tensor, lengths: Tensor) -> Prefix:
        """Keep the prefixes [B, T, d] of ``lengths`` [B]; see :func:`entrgi.rewards.prefix.compute_prefix`."""
        return compute_prefix(self.model, self.masks, inputs_embeds, lengths)

    def hidden(
        self,
        inputs_embeds: Tensor,
        visible: Tensor,
        sequences: RewardSequences | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Last hidden states [A, S, h] of [A, S, d].

        Args:
            visible: bool [A, S], positions that are attended to. The others keep their place: position ids are
                the plain indices of the whole sequence.
            sequences: where the columns lie; None: every sequence begins at column 0 and is read whole.
            prefix: what comes before column 0, by ``sequences.prompt``.
        """
        if sequences is None:
            index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            positions = index.expand(inputs_embeds.shape[:2])
        else:
            positions = sequences.positions
        options = {"position_ids": positions} if self.takes_positions else {}
        if self.masks is None:
            options["attention_mask"] = visible.long()
        elif prefix is None:
            options["attention_mask"] = self.masks(visible, positions, positions, inputs_embeds.dtype)
        else:
            before = prefix.valid[sequences.prompt]
            index = torch.arange(before.shape[1], device=before.device).expand(before.shape)
            keys = torch.cat([index, positions], dim=1)
            options["attention_mask"] = self.masks(
                torch.cat([before, visible], dim=1), keys, positions, inputs_embeds.dtype
            )
            options["past_key_values"] = PrefixCache(prefix, sequences.prompt, sequences.copies)
        return self.model(inputs_embeds=inputs_embeds, use_cache=False, **options).last_hidden_state
