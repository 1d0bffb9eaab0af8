"""Any function of input embeddings as a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entrgi.models.wrapping import callable_twin, refuse_inference_weights
from entrgi.rewards.embedding import EmbeddingReward
from entrgi.rewards.options import RewardOptions
from entrgi.rewards.reader import Reader
from entrgi.rewards.sequences import Places

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from entrgi.rewards.options import RewardArguments


class CallableReward(EmbeddingReward):
    """Any callable ``(inputs_embeds [P, S, d], attention_mask bool [P, S]) -> rewards [P]`` as a reward.

    It reads ``prefix | response | suffix``: the tokenizer's chat template around the messages, or its special tokens
    around the plain text. Sequences are padded on the right with zeros; whatever ``attention_mask`` hides (padding,
    the response after its end) must not enter the reward. For guidance it has to be differentiable in
    ``inputs_embeds``, and must not wait for the device if it is to be captured in a CUDA graph.

    Args:
        function: the callable; it may return [P, 1]. A module runs in evaluation mode and without gradients of its
            weights through a twin that shares them, and is not changed itself.
        tokenizer: maps texts to the ids of ``weight``.
        weight: [V, d], the input embedding by the tokenizer's ids.
        name: what errors call it; None takes the callable's own.
        options: fields of :class:`entrgi.rewards.options.RewardOptions`: ``unmapped``, ``include_prompt``,
            ``max_length``, ``score_batch_size``, ``chat_template_kwargs``.

    Raises:
        ValueError: for a ``weight`` that is not a floating [V, d], or an option out of range.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        tokenizer: PreTrainedTokenizerBase,
        weight: Tensor,
        *,
        name: str | None = None,
        **options: Unpack[RewardArguments],
    ) -> None:
        if not callable(function):
            raise ValueError(f"function: expected a callable, got {function!r:.80}")
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)[:80]
            raise ValueError(f"weight: expected a floating tensor [V, d], got {got}")
        called: str = name or getattr(function, "__name__", type(function).__name__)
        reader = Reader(called, tokenizer, [weight.detach()], RewardOptions.of(type(self), options))
        if isinstance(function, nn.Module):
            refuse_inference_weights("reward", function)
        self.function, twin = callable_twin("reward", function)
        super().__init__(reader, FunctionHead(self.function, called), twin=twin)


class FunctionHead:
    """A function of embeddings and of what is visible, its rewards checked for their shape."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        value, count = self.function(inputs_embeds, visible), inputs_embeds.shape[0]
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape not in ((count,), (count, 1)):
            got = repr(value)[:80] if shape is None else list(shape)
            raise ValueError(f"reward: {self.name} must return rewards of shape [{count}], got {got}")
        return value.reshape(count)
