"""What a reward model is fed for an id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class EmbeddingTable:
    """Input embeddings by id: a matrix, or a layer that does more than look up its rows.

    Gemma scales the rows of its embedding inside that layer (in transformers 5; inside the model before), so
    what the model is to be fed is the layer's output.

    Args:
        rows: [V, d], or the module that has them as its ``weight``, which is asked for it every time.
        layer: the layer that looks them up, or what else maps ids to what the model is fed; None: the rows are used as
            they are.

    Raises:
        ValueError: for weights on the meta device, or a layer that returns more than embeddings.
    """

    def __init__(self, rows: Tensor | nn.Module, layer: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows: Any = rows
        self.layer = layer
        if self.weight.is_meta:
            raise ValueError("reward: its embedding is on the meta device, expected loaded weights")
        if layer is not None:
            probe = torch.arange(min(8, self.weight.shape[0]), device=self.weight.device)
            looked_up = layer(probe)
            if not isinstance(looked_up, Tensor):
                raise ValueError(f"reward: its embedding layer returns a {type(looked_up).__name__}, expected a tensor")
            # An adapter's layer is no embedding, and does not stay what it is.
            if isinstance(layer, nn.Embedding) and torch.equal(looked_up, self.weight[probe]):
                self.layer = None

    @classmethod
    def of(cls, table: EmbeddingTable | nn.Module | Tensor) -> EmbeddingTable:
        """Itself, or that of a matrix or of a layer."""
        if isinstance(table, EmbeddingTable):
            return table
        return cls(table) if isinstance(table, Tensor) else cls(table, table)

    @property
    def weight(self) -> Tensor:
        """[V, d]."""
        return self.rows if isinstance(self.rows, Tensor) else self.rows.weight

    def __call__(self, ids: Tensor) -> Tensor:
        """Embeddings [..., d] of ``ids`` int64 [...]."""
        return self.weight[ids] if self.layer is None else self.layer(ids)

    def full(self) -> Tensor:
        """Embeddings [V, d] of all ids; the matrix itself where the rows are used as they are."""
        if self.layer is None:
            return self.weight
        return self.layer(torch.arange(self.weight.shape[0], device=self.weight.device))


def input_table(model: PreTrainedModel) -> EmbeddingTable:
    """What maps ids to what ``model`` reads of them where it is fed embeddings.

    Over ids, ESM scales its embeddings by the share that was not masked in its training.
    """
    layer = model.get_input_embeddings()
    return EmbeddingTable(layer, (lambda ids: layer(ids) * (1 - 0.15 * 0.8)) if scales_by_share(model) else layer)


def scales_by_share(model: PreTrainedModel) -> bool:
    """Whether ``model`` scales its embeddings by the share of the mask token among the ids."""
    return model.config.model_type == "esm" and model.config.token_dropout
