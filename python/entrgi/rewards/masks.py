"""What a reward model attends to: which positions are visible, and the attention masks made of that.

Masks are prepared here, in four dimensions, because transformers inspects a two-dimensional one on the host: a
synchronisation in every forward pass, and no CUDA graph. Which models take prepared masks, and of which kind, is
a table of what was compared with the models' own masks (tests/rewards/test_architectures.py); a model that is not
in it gets its two-dimensional mask, correct and slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from entrgi.sequences import holds_any

# Causal models by model_type. One mask for all layers:
CAUSAL = (
    {"llama", "arcee", "granite", "helium", "hunyuan_v1_dense", "nemotron", "olmo", "olmo2", "seed_oss"}
    | {"gemma", "glm", "glm4"}
    | {"gpt2", "gpt_bigcode", "gpt_neox", "opt", "persimmon", "phi", "stablelm"}
)
# One sliding window for all layers, where the config has one:
CAUSAL_WINDOW = {"mistral", "ministral3", "mixtral", "phi3", "qwen3_moe", "starcoder2"}
# A mask for each kind of layer in config.layer_types, passed as a dict:
CAUSAL_BY_LAYER = {"qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3", "ministral", "exaone4"}
CAUSAL_BY_LAYER |= {"modernbert-decoder"}
# Causal classifiers whose head is more than a matrix (``score``).
CAUSAL_WITH_HEAD = {"modernbert-decoder"}
# Bidirectional models that take one mask for all layers, in transformers 5 and later:
BIDIRECTIONAL = {
    "bert",
    "distilbert",
    "albert",
    "electra",
    "ernie",
    "megatron-bert",
    "mpnet",
    "rembert",
    "roformer",
} | {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"}
BIDIRECTIONAL_BY_LAYER = {"modernbert"}

FULL, SLIDING = "full_attention", "sliding_attention"


def attention_mask(
    tokens: Tensor,
    valid: Tensor,
    response: Tensor,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> Tensor:
    """What the reward model attends to, bool [P, S]: real positions but the response's end.

    Masked are response positions after the first end-of-sequence token (one id, or the first of several), and those
    that hold the padding token. Where the two are one id (Dream), the first one is masked too, as published.

    Args:
        tokens: int64 [P, S], committed ids, argmax z at masked positions.
        valid: bool [P, S], real positions.
        response: bool [P, S], positions of the response.
    """
    hidden = torch.zeros_like(valid)
    ends = (eos_token_id,) if isinstance(eos_token_id, Integral) else eos_token_id
    if ends:
        is_eos = (response & holds_any(tokens, ends)).long()
        hidden = is_eos.cumsum(dim=1) > is_eos  # an earlier one exists
    if pad_token_id is not None:
        hidden = hidden | (tokens == pad_token_id)
    return valid & ~(hidden & response)


@dataclass(frozen=True)
class PreparedMasks:
    """How a model takes prepared masks.

    Attributes:
        causal: a position sees itself and earlier ones.
        kinds: kinds of layers (``full_attention``, ``sliding_attention``) that get a mask each; empty where all
            layers share one.
        window: of the sliding layers, in tokens: a causal model sees the last ``window`` positions, itself
            included, a bidirectional one those at a distance of at most ``window``. None: no layer slides.
    """

    causal: bool
    kinds: tuple[str, ...] = ()
    window: int | None = None

    def __call__(
        self, visible: Tensor, keys: Tensor, queries: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Additive masks [P, 1, S or 1, T] in ``dtype``: 0 where query attends to key, hugely negative elsewhere.

        Args:
            visible: bool [P, T], which keys may be attended to.
            keys: int64 [P, T], their positions in the whole sequence.
            queries: int64 [P, S], the queries' positions.
        """
        if not self.kinds:
            return self._mask(visible, keys, queries, dtype, self.window)
        windows = {FULL: None, SLIDING: self.window}
        return {kind: self._mask(visible, keys, queries, dtype, windows[kind]) for kind in self.kinds}

    def _mask(self, visible: Tensor, keys: Tensor, queries: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        allowed = visible[:, None, :]
        if self.causal or window is not None:
            distance = queries[:, :, None] - keys[:, None, :]
            if self.causal:
                allowed = allowed & (distance >= 0)
            if window is not None:
                allowed = allowed & (distance < window if self.causal else distance.abs() <= window)
        # Numbers, not truth values: eager attention adds the mask, whatever its dtype. Half the least number (of
        # float32 at most, in which some models take their softmax) stays finite when a score is added to it: a
        # hidden query with nothing to see must not become NaN.
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
        return torch.zeros(allowed.shape, dtype=dtype, device=visible.device).masked_fill(~allowed, least)[:, None]


def prepared_masks(model: PreTrainedModel) -> PreparedMasks | None:
    """How ``model`` takes prepared masks, or None where it has to get a two-dimensional one."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return None  # flash and flex attention have masks of their own
    name, window = config.model_type, getattr(config, "sliding_window", None)
    if name in BIDIRECTIONAL | BIDIRECTIONAL_BY_LAYER:
        if int(transformers.__version__.split(".")[0]) < 5:
            return None
        kinds = tuple(sorted(set(config.layer_types))) if name in BIDIRECTIONAL_BY_LAYER else ()
        return PreparedMasks(causal=False, kinds=kinds, window=window if kinds else None)
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return None
    if name in CAUSAL:
        return PreparedMasks(causal=True)
    if name in CAUSAL_WINDOW:
        return PreparedMasks(causal=True, window=window)
    if name in CAUSAL_BY_LAYER:
        kinds = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
        if kinds and set(kinds) <= {FULL, SLIDING}:
            return PreparedMasks(causal=True, kinds=kinds, window=window)
    return None
