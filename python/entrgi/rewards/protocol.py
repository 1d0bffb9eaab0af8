"""What the sampler needs of a reward: settled once per generation (bind), then differentiated many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser
    from entrgi.prompts import Completion
    from entrgi.sequences import Layout


class BoundReward(Protocol):
    """A reward tied to one generation: P = B * K trajectories, prompt by prompt.

    The reward model's input is a buffer [A, S, d] of A <= P trajectories that the driver fills: with what
    :meth:`inputs` returns, and at the masked positions, whose rows :meth:`rows` names, with relaxed embeddings.
    ``inputs``, ``rows`` and the call itself never wait for the device and can be captured in a CUDA graph.

    Attributes:
        embedding: [V, d], row i is what the buffer holds at a position whose token is the denoiser's id i.
    """

    embedding: Tensor

    def select(self, active: Tensor) -> BoundReward:
        """The trajectories in ``active`` (int64 [A], ascending); itself when those are all."""
        ...

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The buffer with everything but the masked positions filled in, and the ids in the same layout.

        Args:
            tokens: int64 [A, S_denoiser], the denoiser's sequences.

        Returns:
            inputs_embeds [A, S, d], contiguous, and ids int64 [A, S]: the denoiser's ids at the response's columns;
            elsewhere they mean nothing.
        """
        ...

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        """Rows of the flattened buffer [A * S] for columns ``positions`` of the denoiser; all int64 [N]."""
        ...

    def __call__(self, inputs_embeds: Tensor, ids: Tensor) -> Tensor:
        """Rewards [A], differentiable in ``inputs_embeds`` [A, S, d].

        ``ids`` is int64 [A, S], committed ids and argmax z at masked positions: it decides which positions are
        visible, see :func:`entrgi.rewards.masks.attention_mask`.
        """
        ...


class Reward(Protocol):
    """A reward model or anything that acts as one.

    Attributes:
        reads_prompt: it scores prompt and response as one plain text (no chat template).
        device: where its model is.
    """

    reads_prompt: bool
    device: torch.device

    def bind(self, denoiser: Denoiser, layouts: Sequence[Layout], copies: int) -> BoundReward:
        """Tie the reward to the prompts of one generation.

        Args:
            denoiser: the model whose ids the response is made of.
            layouts: B prompts as the denoiser reads them.
            copies: K, trajectories per prompt.

        Raises:
            ValueError: for whatever makes the generation impossible: a prompt that does not fit the context or
                cannot be rendered, vocabularies that share nothing, models on different devices.
        """
        ...

    def score(self, completions: Sequence[Completion]) -> Tensor:
        """Rewards of decoded texts, fp32 [n] on the CPU.

        Raises:
            RuntimeError: naming the text, where a reward is not finite.
        """
        ...
