"""Any function of input embeddings as a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entrgi.models.wrapping import callable_twin, refuse_inference_weights
from entrgi.rewards.embedding import EmbeddingReward, EmbeddingTable


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
        missing: ``unk`` or ``zero``, see :func:`entrgi.vocabulary.align_embedding`.
        include_prompt: without a chat template, whether the text begins with the prompt; where the denoiser reads
            the prompt through a chat template of its own, the response is read alone all the same.
        max_length: context in tokens, or None.
        score_batch_size: texts per call of :meth:`score`.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        name: what errors call it; None takes the callable's own.

    Raises:
        ValueError: for a ``weight`` that is not a floating [V, d], or an option out of range.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        tokenizer: PreTrainedTokenizerBase,
        weight: Tensor,
        *,
        missing: str = "unk",
        include_prompt: bool = True,
        max_length: int | None = None,
        score_batch_size: int = 16,
        chat_template_kwargs: Mapping[str, object] | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise ValueError(f"function: expected a callable, got {function!r:.80}")
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)[:80]
            raise ValueError(f"weight: expected a floating tensor [V, d], got {got}")
        super().__init__(
            name or getattr(function, "__name__", type(function).__name__),
            tokenizer,
            [EmbeddingTable(weight.detach())],
            missing=missing,
            include_prompt=include_prompt,
            max_length=max_length,
            score_batch_size=score_batch_size,
            chat_template_kwargs=chat_template_kwargs,
        )
        if isinstance(function, nn.Module):
            refuse_inference_weights("reward", function)
        self.function, self.twin = callable_twin("reward", function)

    def relaxed(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """See :meth:`EmbeddingReward.relaxed`. Raises ValueError where the callable returns another shape."""
        value = self.function(inputs_embeds, attention_mask)
        count = inputs_embeds.shape[0]
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape not in ((count,), (count, 1)):
            got = repr(value)[:80] if shape is None else list(shape)
            raise ValueError(f"reward: {self.name} must return rewards of shape [{count}], got {got}")
        return value.reshape(count)
