"""Texts to ids, without changing the tokenizer that somebody else may be using."""

from __future__ import annotations

from threading import Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from entrgi.messages import check_text

_copies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[bool, tuple[object, Tokenizer]]] = WeakKeyDictionary()
_lock = Lock()


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, label: str = "prompts") -> list[int]:
    """Ids of ``text`` without added special tokens; special tokens spelled out in it are recognised.

    Raises ValueError for half a surrogate pair.
    """
    check_text(text, label)
    own = _own_copy(tokenizer)
    if own is None:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return own.encode(text, add_special_tokens=False).ids


def frame_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts around every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return list(tokenizer("", verbose=False)["input_ids"])
    around = backend.encode("")
    return [token_id for token_id, is_real in zip(around.ids, around.attention_mask, strict=True) if is_real]


def spelled_ids(tokenizer: PreTrainedTokenizerBase, token_id: int) -> list[int] | None:
    """Ids of a special token's spelling as any other text, such as ``<``, ``mask`` and ``>``.

    None where the tokenizer has no other ids for it.
    """
    token = tokenizer.convert_ids_to_tokens(token_id)
    own = _own_copy(tokenizer, splits_special=True)
    if own is None:
        ids = tokenizer(token, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
    else:
        ids = own.encode(token, add_special_tokens=False).ids
    return None if {token_id, named_id(tokenizer, "unk")} & set(ids) else list(ids)


def named_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of the special token ``cls``, ``unk`` ...; transformers declares attributes of any type."""
    return getattr(tokenizer, f"{name}_token_id")


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int], **options: Any) -> str:
    """``tokenizer.decode`` of one text; transformers 5 declares that it may be several."""
    return cast(str, tokenizer.decode(ids, **options))


def _own_copy(tokenizer: PreTrainedTokenizerBase, splits_special: bool = False) -> Tokenizer | None:
    """A copy of the Rust tokenizer that truncates and pads nothing; None for a tokenizer written in Python.

    Encoding through ``tokenizer`` itself would change the object that all its users share, in other threads, too.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    splits_special = splits_special or bool(getattr(tokenizer, "split_special_tokens", False))
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    added = tuple(sorted(backend.get_added_tokens_decoder()))
    state = (id(backend), backend.get_vocab_size(), added, *map(type, parts))
    with _lock:
        known = _copies.setdefault(tokenizer, {})
        if splits_special not in known or known[splits_special][0] != state:
            copy = Tokenizer.from_str(backend.to_str())
            copy.no_truncation()
            copy.no_padding()
            copy.encode_special_tokens = splits_special
            known[splits_special] = (state, copy)
        return known[splits_special][1]
