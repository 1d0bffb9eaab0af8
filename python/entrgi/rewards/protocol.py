"""What the sampler needs of a reward: settled once per generation (bind), then differentiated many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from entrgi.deprecation import warn_renamed

if TYPE_CHECKING:
    from entrgi.denoisers import Denoiser
    from entrgi.prompts import Completion
    from entrgi.rewards.sequences import Places
    from entrgi.sequences import Layout


class BoundReward(Protocol):
    """A reward tied to one generation: P = B * K trajectories, prompt by prompt.

    The reward model's input is a buffer [A, S, d] of A <= P trajectories that the driver fills: with what
    :meth:`inputs` returns, and at the masked positions, which :meth:`row_index` finds, with relaxed embeddings.
    ``inputs``, ``row_index`` and the call itself never wait for the device and can be captured in a CUDA graph.

    Attributes:
        embedding: [V, d], row i is what the buffer holds at a position whose token is the denoiser's id i.
    """

    if TYPE_CHECKING:  # an attribute will do

        @property
        def embedding(self) -> Tensor: ...

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

    def row_index(self, trajectories: Tensor, positions: Tensor) -> Tensor:
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

    if TYPE_CHECKING:  # attributes will do

        @property
        def reads_prompt(self) -> bool: ...

        @property
        def device(self) -> torch.device: ...

    def bind(self, denoiser: Denoiser, layouts: Sequence[Layout], num_trajectories: int) -> BoundReward:
        """Tie the reward to the prompts of one generation.

        Args:
            denoiser: the model whose ids the response is made of.
            layouts: B prompts as the denoiser reads them.
            num_trajectories: K, trajectories per prompt.

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


class Head(Protocol):
    """What an :class:`entrgi.rewards.EmbeddingReward` makes of input embeddings; a plain function will do.

    It has to be differentiable in ``inputs_embeds``, must not wait for the device if it is to be captured in a CUDA
    graph, and is asked in the same way in guidance and for the final score.
    """

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        """Rewards [P].

        Args:
            inputs_embeds: [P, S, d], padded on the right with zeros.
            visible: bool [P, S]; what is not visible (padding, the response after its end) must not enter the reward.
            places: what the columns are. For a reader with ``judges_response``, ``places.response`` (bool [P, S]) is
                the response; for others that is the response's window in guidance and the whole text in the score.
        """
        ...


class DeprecatedRows:
    """The name that :meth:`BoundReward.row_index` had before."""

    def rows(self, trajectories: Tensor, positions: Tensor) -> Tensor:
        """Deprecated: :meth:`BoundReward.row_index`."""
        warn_renamed("BoundReward.rows(...)", "row_index(...)")
        bound: Any = self
        return bound.row_index(trajectories, positions)


def check_bound(bound: BoundReward) -> BoundReward:
    """``bound``, with a warning where it has ``rows`` in place of ``row_index``."""
    if _has_former_name(bound):
        former = f"{type(bound).__name__}.rows(...) of a bound reward"
        warn_renamed(former, "row_index(...)")
    return bound


def row_index(bound: BoundReward, trajectories: Tensor, positions: Tensor) -> Tensor:
    """``bound.row_index(...)``, also of bound rewards that call it ``rows``."""
    own: Any = bound
    find = own.rows if _has_former_name(bound) else own.row_index
    return find(trajectories, positions)


def _has_former_name(bound: BoundReward) -> bool:
    # A class derived from the protocol has inherited its row_index, which returns None.
    own = getattr(type(bound), "row_index", None) is not BoundReward.row_index and hasattr(bound, "row_index")
    return hasattr(bound, "rows") and not own
