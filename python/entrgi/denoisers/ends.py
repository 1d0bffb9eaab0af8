"""The tokens that end a response: checkpoints name several, in several places."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from entrgi.denoisers.protocol import Denoiser
from entrgi.models.fields import is_number
from entrgi.prompts import Options, first_not_none, split_chat
from entrgi.tokenizing import decode_ids, named_id, plain_ids


def end_ids(denoiser: Denoiser) -> tuple[int, ...]:
    """All ids that end a response of ``denoiser``, its ``eos_token_id`` first; none without one."""
    if denoiser.eos_token_id is None:
        return ()
    return tuple(dict.fromkeys([denoiser.eos_token_id, *getattr(denoiser, "end_token_ids", ())]))


def choose_end_ids(
    given: int | Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    mask_token_id: int,
    declared: Sequence[int] = (),
    options: Options | None = None,
) -> tuple[int, ...]:
    """The ids that end a response, the one to fill up with first.

    Args:
        given: one or several; None takes the tokenizer's, ``declared``, and what the chat template closes
            the assistant's turn with.
        declared: by config.json and generation_config.json.
        options: of the chat template.

    Raises:
        ValueError: for ``given`` ids that are none of the logits.
    """
    if given is not None:
        several = isinstance(given, Sequence | set | frozenset) and not isinstance(given, str)
        chosen: Any = given
        ids = list(chosen) if several else [chosen]
        for token_id in ids:
            if not is_number(token_id, Integral) or not 0 <= token_id < vocab_size:
                raise ValueError(f"denoiser: eos_token_id {token_id!r} is not an id below vocab_size {vocab_size}")
            if token_id == mask_token_id:
                raise ValueError(f"denoiser: eos_token_id {token_id} is the mask token, expected one that is written")
        return tuple(dict.fromkeys(map(int, ids)))
    own = first_not_none(named_id(tokenizer, "eos"), named_id(tokenizer, "sep"))
    ids = [own, *declared, turn_end(tokenizer, options)]
    # What is never drawn ends nothing: ids beyond the logits, and the mask itself.
    drawn = [token_id for token_id in ids if token_id is not None and 0 <= token_id < vocab_size]
    return tuple(token_id for token_id in dict.fromkeys(drawn) if token_id != mask_token_id)


def turn_end(tokenizer: PreTrainedTokenizerBase, options: Options | None = None) -> int | None:
    """The special token with which the chat template closes the assistant's turn, if any."""
    if tokenizer.chat_template is None and not (options or {}).get("chat_template"):
        return None
    try:
        _, tail = split_chat(tokenizer, uuid4().hex, options)
    except ValueError:  # a template that asks for more than this; whoever renders a prompt is told
        return None
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in plain_ids(tokenizer, tail):
        if token_id in special:
            return token_id
        if decode_ids(tokenizer, [token_id]).strip():
            return None
    return None
