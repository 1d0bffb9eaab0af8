"""The options that rewards share. A new one is a field of a dataclass here and a key of the TypedDict beside it.

The dataclasses hold defaults, descriptions and checks; the TypedDicts say the same names to editors and type checkers,
which see them in every constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from entrgi.deprecation import rename_option
from entrgi.models.errors import refuse_unknown
from entrgi.sequences import check_length
from entrgi.vocabulary import UNMAPPED_ROWS

if TYPE_CHECKING:
    from typing_extensions import Self


class RewardArguments(TypedDict, total=False):
    """The fields of :class:`RewardOptions` as keyword arguments."""

    unmapped: str
    include_prompt: bool
    max_length: int | None
    score_batch_size: int
    chat_template_kwargs: Mapping[str, Any] | None


class ModelRewardArguments(RewardArguments, total=False):
    """The fields of :class:`ModelRewardOptions` as keyword arguments."""

    reuse_prefix: bool
    compile: bool


class LoadingArguments(ModelRewardArguments, total=False):
    """The same, and where a checkpoint is looked for; see :func:`entrgi.models.checkpoints.load_pretrained`."""

    revision: str
    cache_dir: str | Path
    token: str | bool
    local_files_only: bool
    subfolder: str
    variant: str
    attn_implementation: str
    device_map: object


@dataclass(frozen=True)
class RewardOptions:
    """How a reward reads texts.

    Attributes:
        unmapped: what the model reads for ids of the denoiser that it has no token for: ``unk`` or ``zero``, see
            :func:`entrgi.vocabulary.align_embedding`.
        include_prompt: without a chat template, whether the text begins with the prompt; where the denoiser reads the
            prompt through a chat template of its own, the response is read alone all the same.
        max_length: context in tokens; None takes what the model and its tokenizer declare.
        score_batch_size: texts per forward pass of ``score``.
        chat_template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``; ``chat_template``
            among them is a template, or the name of one of the tokenizer's.

    Raises:
        ValueError: for an option out of range.
    """

    unmapped: str = "unk"
    include_prompt: bool = True
    max_length: int | None = None
    score_batch_size: int = 16
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.unmapped not in UNMAPPED_ROWS:
            raise ValueError(f"reward: unmapped must be one of {', '.join(UNMAPPED_ROWS)}, got {self.unmapped!r}")
        if self.max_length is not None:
            check_length("reward: max_length", self.max_length)
        check_length("reward: score_batch_size", self.score_batch_size)

    @classmethod
    def of(cls, owner: type, given: Mapping[str, Any]) -> Self:
        """From the keyword arguments of ``owner``'s constructor.

        Raises:
            ValueError: for a name that is none of the fields, or a value out of range.
        """
        given = dict(given)
        rename_option(given, "missing", "unmapped")
        refuse_unknown(owner.__name__, given, [field.name for field in fields(cls)])
        return cls(**given)

    def within(self, context: int | None) -> Self:
        """With ``context`` as ``max_length`` where none was given."""
        return replace(self, max_length=context) if self.max_length is None else self


@dataclass(frozen=True)
class ModelRewardOptions(RewardOptions):
    """How a reward reads texts and runs its model.

    Attributes:
        reuse_prefix: compute keys and values of what stands before the response once per generation (causal models
            that compute the same after a kept one, which is tried). The same rewards and gradients to rounding.
        compile: run the transformer through ``torch.compile``.
    """

    reuse_prefix: bool = True
    compile: bool = False


OPTION_NAMES = (*(field.name for field in fields(ModelRewardOptions)), "missing")


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``options`` of the reward, and all others, which say where and how a checkpoint is loaded."""
    own = {name: value for name, value in options.items() if name in OPTION_NAMES}
    return own, {name: value for name, value in options.items() if name not in OPTION_NAMES}
