"""Attention of transformers under names of our own, whose masks are built without a look at them on the host.

Before it builds a mask, transformers asks whether all of it is ones: the device is waited for in every pass, and no
CUDA graph can hold it. Which positions a model lets see each other (causal, a window, each kind of layer its own) is
its own affair: it builds its masks itself, through transformers' mask interface, where the function is found by the
name of the attention. So there is no list of architectures here. A model is given the new name where it computes the
same numbers with it, and keeps its own otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_BIDIRECTIONAL = "entrgi_bidirectional"
_ON_DEVICE = {"sdpa": "entrgi_sdpa", "eager": "entrgi_eager"}
_CLOSE = 0.02  # of the largest number; another mask changes more, rounding less


def see_everything(model: PreTrainedModel) -> None:
    """Have every position of a causal ``model`` see all others, where it is given a :func:`padding_mask` or none.

    The name has no mask function: transformers hands prepared masks on as they are, and none as none, whatever a
    version does for causal models.
    """
    model.set_attn_implementation(_BIDIRECTIONAL)


def padding_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask [P, 1, 1, T]: every query sees the keys of ``visible`` [P, T]."""
    return _additive(visible[:, None, None, :].bool(), dtype)


def keep_masks_on_device(model: PreTrainedModel) -> None:
    """Have ``model`` build its masks without reading them on the host, where it computes the same that way.

    Left as they are: models with another attention than ``sdpa`` and ``eager``, and those that compute something else
    or fail in the trial, a padded batch of two short texts.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    # GPT-2 takes the softmax in float32 under the name "eager" only.
    if own not in _ON_DEVICE or getattr(config, "reorder_and_upcast_attn", False):
        return
    layer: Any = model.get_input_embeddings()
    rows = layer.weight.shape[0]
    ids = torch.arange(14, device=model.device).view(2, 7) % rows
    mask = torch.ones_like(ids)
    mask[1, 2:3].fill_(0)
    mask[1, 5:].fill_(0)
    body = model.base_model
    with trial(model.device):
        try:
            expected = body(input_ids=ids, attention_mask=mask)[0]
            _rename(model, own, _ON_DEVICE[own])
            same = is_close(body(input_ids=ids, attention_mask=mask)[0], expected, mask.bool())
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:
            same = False
    if not same:
        _rename(model, _ON_DEVICE[own], own)


@contextmanager
def trial(device: torch.device) -> Iterator[None]:
    """Without gradients, and with the global random state as it was before."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def is_close(hidden: Tensor, expected: Tensor, where: Tensor) -> bool:
    """Whether hidden states [P, S, h] are the expected ones up to rounding; of the positions ``where``, bool [P, S]."""
    hidden, expected = hidden[where].float(), expected[where].float()
    return bool((hidden - expected).abs().max() <= _CLOSE * expected.abs().max())


def _rename(model: PreTrainedModel, former: str, name: str) -> None:
    # What has another attention (a part for images) keeps it.
    # Not by set_attn_implementation: in transformers 4 some models choose their attention when they are built, and
    # ask for its name when they build masks.
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == former:
            module.config._attn_implementation_internal = name


def _mask(own: Callable[..., Tensor | None], *arguments: Any, **options: Any) -> Tensor | None:
    """An additive mask [P, 1, S or 1, T]. Without padding nothing is read: it is the ``own`` of transformers."""
    visible = options.get("attention_mask")
    if visible is None:
        return own(*arguments, **options)
    if options.get("mask_function") is _EVERYTHING:
        return padding_mask(visible, options["dtype"])
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed: Any = sdpa_mask(*arguments, **{**options, **skips})
    return _additive(allowed, options["dtype"])


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # Numbers, not truth values: eager attention adds the mask, whatever its dtype. Half the least number (of
    # float32 at most, in which some models take their softmax) stays finite when a score is added to it: a
    # hidden query with nothing to see must not become NaN.
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, least)


def _own_eager(module: nn.Module, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Every architecture has an eager attention of its own."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


def _bidirectional_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Full attention of ``query`` [P, H, S, D] to ``key`` and ``value`` [P, H_kv, S, D]; returns [P, S, H, D]."""
    # Rotations in full precision leave query and key wider than the model.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups: Any = module.num_key_value_groups
    if groups > 1 and attention_mask is not None:  # with a mask, grouped heads have only the slow math kernel on CUDA
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        groups = 1
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=groups > 1
    )
    return output.transpose(1, 2).contiguous(), None


try:
    from transformers.masking_utils import bidirectional_mask_function as _EVERYTHING
except ImportError:  # transformers 4
    _EVERYTHING = None

AttentionInterface.register(_BIDIRECTIONAL, _bidirectional_attention)
AttentionInterface.register(_ON_DEVICE["sdpa"], sdpa_attention_forward)
AttentionInterface.register(_ON_DEVICE["eager"], _own_eager)
AttentionMaskInterface.register(_ON_DEVICE["sdpa"], partial(_mask, sdpa_mask))
AttentionMaskInterface.register(_ON_DEVICE["eager"], partial(_mask, eager_mask))
