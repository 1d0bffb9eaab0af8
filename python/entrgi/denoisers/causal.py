"""Decoder-only transformers run bidirectionally: what Dream and LLaDA share.

The way of the data: tokens -> hidden states -> those at the chosen positions -> output layer on these rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrgi.denoisers.base import BaseDenoiser, DenoiserOptions, TokenOptions, take_own
from entrgi.denoisers.compilation import compile_blocks
from entrgi.denoisers.protocol import check_width, shifted_positions
from entrgi.denoisers.weights import load_weights
from entrgi.models.adapters import apply_adapter
from entrgi.models.attention import padding_mask, see_everything
from entrgi.models.checkpoints import context_length, find_checkpoint, hub, load_tokenizer, refuse_remote_code
from entrgi.models.errors import loading, refuse_unknown
from entrgi.models.fields import architectures_of, check_layers, is_number, warn_of_unread
from entrgi.models.files import HUB_OPTIONS, stored_weights
from entrgi.models.generation import declared_end_ids, keep_end_ids
from entrgi.models.placement import choose_device, choose_dtype
from entrgi.models.wrapping import Twin, check_tokenizer, unwrap_pretrained
from entrgi.prompts import Encoded, first_not_none
from entrgi.tokenizing import named_id

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BidirectionalLM(BaseDenoiser):
    """A ``*ForCausalLM`` of transformers whose every position sees every real one, as a denoiser.

    A chat is the rendered template; plain text follows the tokenizer's BOS token where it has one. The output
    layer runs at the chosen positions only, and a CUDA device never waits for the host.

    Args:
        model: the model, with ``model.model`` (the body) and ``model.lm_head``, also inside ``PeftModel``,
            ``torch.compile`` or ``DistributedDataParallel``. It runs in evaluation mode, without gradients and with
            bidirectional attention through a twin that shares its weights, and is not changed itself.
        tokenizer: encodes prompts and decodes responses.
        mask_token_id, pad_token_id: None takes the tokenizer's.
        eos_token_id: an id or several that end a response; None takes what tokenizer, config.json,
            generation_config.json and chat template say. The first one fills what early_exit leaves.
        chat: whether prompts go through the chat template; None: where the tokenizer has one.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.
        max_length: context in tokens; None takes what model and tokenizer declare.
        compile: compile the transformer blocks, see :func:`entrgi.denoisers.compilation.compile_blocks`.

    Raises:
        ValueError: without a mask token id, or with ids beyond the logits.
    """

    #: Whether the model predicts the *next* position: the logits of position l then come from l - 1.
    shift: ClassVar[bool]
    #: Its names in config.json.
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    #: What is read of config.json, beside ids and names.
    fields_read: ClassVar[tuple[str, ...]]

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
        if not isinstance(getattr(model, "lm_head", None), nn.Module):
            raise ValueError(
                f"denoiser: {type(model).__name__} has no lm_head, expected a *ForCausalLM for a {type(self).__name__}"
            )
        self._twin = Twin(model)
        model = self._twin.module
        self.model = model
        self._settle(tokenizer, model.lm_head.out_features, declared_end_ids(model), **options)
        if self.max_length is None:
            self.max_length = context_length(model, tokenizer)
        # The rotary frequencies are float32, also where the model was cast as a whole or built on the meta device.
        with torch.inference_mode(False):
            self._rotary = type(model.model.rotary_emb)(config=model.config).to(model.device).eval()
        model.model.rotary_emb = self._rotary
        see_everything(model)
        self._twin.watch(model.model)
        if compile:
            compile_blocks(model)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Unpack[DenoiserOptions]) -> BidirectionalLM:
        """Load a checkpoint in its official layout: config.json, safetensors, tokenizer files; none of its code.

        Weights are read one at a time, straight to ``device``: memory never holds them twice.

        Args:
            name: a folder, or a hub id.
            options: see :class:`entrgi.denoisers.base.DenoiserOptions`; the ids of mask and padding may also be
                config.json's.

        Raises:
            ValueError: for a checkpoint that cannot be had, is of another ``model_type``, asks for something
                that is not supported, or does not hold just the weights that its config describes.
        """
        own, rest = take_own(options), cast(Any, options)
        dtype, device, adapter = (rest.pop(option, None) for option in ("dtype", "device", "adapter"))
        dtype, place = choose_dtype("denoiser", dtype), choose_device("denoiser: device", device)
        refuse_remote_code("denoiser", rest)
        refuse_unknown("denoiser", rest, (*HUB_OPTIONS, "subfolder"), near=DenoiserOptions.__annotations__)
        folder, fields = find_checkpoint("denoiser", name, rest)
        # Parameters made under inference mode cannot take part in a gradient later.
        with torch.inference_mode(False):
            with loading("denoiser", name):
                cls._check_kind(name, fields)
                tokenizer = cls._load_tokenizer(folder)
                weights = stored_weights("denoiser", folder)
                check_layers("denoiser", name, fields, len(weights.tensors))
                with torch.device("meta"):
                    model = cls.build_model(fields)
                warn_of_unread(name, fields, cls.fields_read)
                modules = cls._modules(model)
                load_weights(model, folder, weights, modules, dtype, place)
                keep_end_ids("denoiser", model, folder, fields, tokenizer)
                if adapter is not None:
                    model = _with_adapter(model, modules, adapter, hub(rest))
            mask, pad = _one_id(fields, "mask_token_id"), _one_id(fields, "pad_token_id")
            own["mask_token_id"] = first_not_none(own.get("mask_token_id"), mask)
            own["pad_token_id"] = first_not_none(own.get("pad_token_id"), named_id(tokenizer, "pad"), pad)
            return cls(model, tokenizer, **own)

    @classmethod
    def _check_kind(cls, name: str | Path, fields: Mapping[str, Any]) -> None:
        """Raise ValueError unless ``architectures`` and ``model_type`` are this class's."""
        if fields.get("model_type") not in (None, cls.model_type):
            raise ValueError(
                f"denoiser: config.json of {str(name)!r} has model_type {fields.get('model_type')!r}, "
                f"expected {cls.model_type!r} for a {cls.__name__}"
            )
        architectures = architectures_of(fields)
        if (architectures or "model_type" not in fields) and cls.architecture not in architectures:
            raise ValueError(
                f"denoiser: config.json of {str(name)!r} has architectures {fields.get('architectures')!r}, expected "
                f"{cls.architecture!r} for a {cls.__name__}; load anything else yourself and pass it to "
                "CallableDenoiser"
            )

    @staticmethod
    def build_model(fields: Mapping[str, Any]) -> PreTrainedModel:
        """The model that the fields of a config.json describe, with random weights.

        Raises:
            ValueError: for a field that is missing, or that asks for something not supported.
        """
        raise NotImplementedError

    def _framed(self, encoded: Encoded) -> Encoded:
        if not encoded.is_text:
            return encoded
        bos = named_id(self.tokenizer, "bos")  # never [CLS], which LLaDA's tokenizer also declares
        return replace(encoded, prefix=[] if bos is None else [bos], suffix=[])

    @torch.no_grad()
    def logits(self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        self._twin.refresh()
        if self._rotary.inv_freq.device != tokens.device:  # the twin's own: it does not move with the user's model
            self._rotary.to(tokens.device)
        mask = None if attention_mask is None else padding_mask(attention_mask, self.dtype)
        hidden = self.model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        if self.shift:
            positions = shifted_positions(positions, tokens.shape[1])
        return check_width(self.model.lm_head(hidden.flatten(0, 1).index_select(0, positions)), self.vocab_size)

    @staticmethod
    def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
        return load_tokenizer("denoiser", folder)

    @staticmethod
    def _modules(model: PreTrainedModel) -> dict[str, str]:
        """The model's name of each module, by the official checkpoint's name, where the two differ."""
        return {}


class OfficialNames(nn.Module):
    """The modules of ``model`` as a tree with the names of the official checkpoint; both share them.

    Args:
        modules: the model's name of each module, by the official one.
    """

    def __init__(self, model: PreTrainedModel, modules: Mapping[str, str]) -> None:
        super().__init__()
        self.config, self.prepare_inputs_for_generation = model.config, None  # peft asks for both
        for theirs, ours in modules.items():
            parent: nn.Module = self
            *path, leaf = theirs.split(".")
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(leaf, model.get_submodule(ours))


def _with_adapter(
    model: PreTrainedModel,
    modules: Mapping[str, str],
    adapter: str | Path | Sequence[str | Path],
    hub_options: Mapping[str, Any],
) -> PreTrainedModel:
    """``model`` with a LoRA adapter merged in that was trained on the official names."""
    if not modules:
        return apply_adapter(model, adapter, "denoiser", **hub_options)[0]
    tree: Any = OfficialNames(model, modules)
    merged, _ = apply_adapter(tree, adapter, "denoiser", **hub_options)
    for theirs, ours in modules.items():  # an adapter may bring whole modules
        path, _, leaf = ours.rpartition(".")
        setattr(model.get_submodule(path), leaf, merged.get_submodule(theirs))
    return model


def _one_id(fields: Mapping[str, Any], name: str) -> int | None:
    """A token id of a config.json; the first where it lists several."""
    value = fields.get(name)
    value = (value[0] if value else None) if isinstance(value, list) else value
    if value is not None and not is_number(value, Integral):
        raise ValueError(f"denoiser: config.json has {name} {fields[name]!r:.200}, expected an id")
    return value
