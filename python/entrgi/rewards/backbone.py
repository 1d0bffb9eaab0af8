"""Hidden states of a causal transformer over input embeddings, with or without a kept prefix."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrgi.models.attention import is_close, keep_masks_on_device, trial
from entrgi.rewards.prefix import Prefix, PrefixCache, compute_prefix
from entrgi.rewards.sequences import Places

# Kinds of layers of which an earlier key is all that is to be kept.
_LAYERS = {"full_attention", "sliding_attention"}


class CausalBackbone:
    """The transformer of a causal model without its head.

    Args:
        model: with a head, which is not run.

    Attributes:
        reuses_prefix: a prefix can be kept. Where the model computes something else after one, or fails, every pass
            reads the whole sequence instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Gemma 3 in transformers 4 misnames its own: base_model is then the model, head and all.
        self.model: Any = model.get_decoder() if model.base_model is model else model.base_model
        keep_masks_on_device(model)
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        follows = self.takes_positions and layers <= _LAYERS
        self.reuses_prefix = follows and self._follows_prefix(model.get_input_embeddings())

    def prefix(self, inputs_embeds: Tensor, lengths: Tensor) -> Prefix:
        """Keep the prefixes [B, T, d] of ``lengths`` [B]; see :func:`entrgi.rewards.prefix.compute_prefix`."""
        return compute_prefix(self.model, inputs_embeds, lengths)

    def hidden(
        self,
        inputs_embeds: Tensor,
        visible: Tensor,
        sequences: Places | None = None,
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
            return self._pass(inputs_embeds, visible, index.expand(inputs_embeds.shape[:2]))
        cache = None
        if prefix is not None:
            assert sequences.prompt is not None  # whose prefix each reads
            cache = PrefixCache(prefix, sequences.prompt, sequences.num_trajectories)
        return self._pass(inputs_embeds, visible, sequences.positions, cache)

    def _pass(
        self, inputs_embeds: Tensor, visible: Tensor, positions: Tensor, cache: PrefixCache | None = None
    ) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if cache is not None:
            visible = torch.cat([cache.prefix.valid[cache.prompt], visible], dim=1)
            options["past_key_values"] = cache
        return self.model(
            inputs_embeds=inputs_embeds, attention_mask=visible.long(), use_cache=False, **options
        ).last_hidden_state

    def _follows_prefix(self, embedding: Any) -> bool:
        """Whether the model computes after two prefixes, one of them padded, what it does without."""
        device, rows = embedding.weight.device, embedding.weight.shape[0]
        visible = torch.ones(2, 8, dtype=torch.bool, device=device)
        visible[1, 5:6].fill_(False)
        lengths, both = torch.tensor([4, 2], device=device), torch.arange(2, device=device)
        columns = lengths[:, None] + torch.arange(4, device=device)
        with trial(device):
            try:
                embeds = embedding((torch.arange(16, device=device) % rows).view(2, 8))
                expected = self.hidden(embeds, visible)[both[:, None], columns]
                cache = PrefixCache(self.prefix(embeds[:, :4], lengths), both, None)
                rest, seen = embeds[both[:, None], columns], visible[both[:, None], columns]
                return is_close(self._pass(rest, seen, columns, cache), expected, seen)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception:
                return False
