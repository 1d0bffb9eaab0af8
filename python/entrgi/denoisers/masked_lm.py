"""Masked language models of transformers as denoisers."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from entrgi.denoisers.base import BaseDenoiser, DenoiserOptions, TokenOptions, take_own
from entrgi.denoisers.compilation import compile_blocks
from entrgi.denoisers.protocol import check_width
from entrgi.models.attention import keep_masks_on_device
from entrgi.models.checkpoints import context_length, load_pretrained
from entrgi.models.generation import declared_end_ids
from entrgi.models.wrapping import Twin, check_tokenizer, unwrap_pretrained, wrapped_layer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of the call in this thread: the hook that reads it serves all threads.
_positions: ContextVar[Tensor | None] = ContextVar("entrgi.denoisers.positions", default=None)


class MaskedLM(BaseDenoiser):
    """Any ``AutoModelForMaskedLM`` (BERT, DistilBERT, RoBERTa, ModernBERT ...) as a denoiser.

    The sequence is ``[CLS] prompt [MASK] * L [SEP]`` with the tokenizer's own special tokens; the
    language-model head runs at the chosen positions only.

    A CUDA device never waits for the host where the model runs transformers' ``sdpa`` attention, its default,
    and builds its masks through transformers' mask interface, as BERT, DistilBERT, RoBERTa, ModernBERT and
    most others do from transformers 5 on: such a model runs the same attention under another name, whose
    masks are built without looking at them. Elsewhere (``eager`` or flash attention, DeBERTa, transformers 4)
    the model may look at the mask of a padded batch on the host, once per pass; the result is the same.

    Args:
        model: the model, also inside ``PeftModel``, ``torch.compile`` or ``DistributedDataParallel``. It runs in
            evaluation mode and without gradients through a twin that shares its weights, and is not changed itself.
        tokenizer: its tokenizer, with a mask token.
        mask_token_id, pad_token_id: None takes the tokenizer's.
        eos_token_id: an id or several that end a response; None takes what tokenizer, config.json,
            generation_config.json and chat template say. The first one fills what early_exit leaves.
        max_length: context in tokens; None takes what model and tokenizer declare.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        compile: compile the transformer blocks, see :func:`entrgi.denoisers.compilation.compile_blocks`.

    Raises:
        ValueError: without a mask token id, with ids beyond the logits, and for a causal language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compile: bool = False,
        **options: Unpack[TokenOptions],
    ) -> None:
        model = unwrap_pretrained("denoiser", model)
        check_tokenizer("denoiser", tokenizer)
        _check_bidirectional(model)
        head: Any = model.get_output_embeddings()
        if not isinstance(wrapped_layer(head), nn.Linear):
            raise ValueError(f"denoiser: {type(model).__name__} has no language-model head, expected a masked LM")
        self._twin = Twin(model)
        model = self._twin.module
        self.model = model
        self._settle(tokenizer, head.out_features, declared_end_ids(model), **options)
        if self.max_length is None:
            self.max_length = context_length(model, tokenizer)
        keep_masks_on_device(model)
        # Every architecture names its head differently, and all of them read the encoder's output: it is cut down
        # to the chosen positions on its way to the head.
        model.base_model.register_forward_hook(_pick)
        self._twin.watch(model.base_model)
        if compile:
            compile_blocks(model)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Unpack[DenoiserOptions]) -> MaskedLM:
        """Load a checkpoint folder or hub id; see :func:`entrgi.models.checkpoints.load_pretrained`."""
        own, known = take_own(options), DenoiserOptions.__annotations__
        return cls(*load_pretrained("denoiser", name, AutoModelForMaskedLM, known=known, **options), **own)

    @property
    def _rows(self) -> int:
        layer: Any = self.model.get_input_embeddings()
        return layer.weight.shape[0]

    @torch.no_grad()
    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        self._twin.refresh()
        token = _positions.set(positions)
        try:
            logits = self.model(input_ids=tokens, attention_mask=attention_mask).logits
        finally:
            _positions.reset(token)
        return check_width(logits, self.vocab_size).view(positions.shape[0], self.vocab_size)


def _pick(_module: nn.Module, _inputs: object, output: Any) -> object:
    """The encoder's output at the positions of the call that this thread is in; all of it outside of one."""
    positions = _positions.get()
    if positions is None:
        return output
    _positions.set(None)  # once: the model may be the twin of one that has the hook, too
    chosen = output[0].flatten(0, 1).index_select(0, positions)[None]
    if isinstance(output, tuple):
        return chosen, *output[1:]
    output.last_hidden_state = chosen
    return output


def _check_bidirectional(model: PreTrainedModel) -> None:
    """Raise ValueError for a causal language model, by its class or by its config."""
    names = {cls.__name__ for cls in type(model).__mro__}
    causal = names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if causal and not names & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
        raise ValueError(
            f"denoiser: {type(model).__name__} is a causal language model, expected a masked one: no position of it "
            "sees those after it; pass a model that you run otherwise to CallableDenoiser"
        )
    for name, neutral in {"is_decoder": False, "is_causal": False, "bd_size": None}.items():
        value = getattr(model.config, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"denoiser: the config of {type(model).__name__} has {name} {value!r}, expected {neutral!r}: every "
                "position of a masked language model sees all others"
            )
