"""How a tokenizer spells text in its tokens, read from its parts (decoder, pre-tokenizer, normaliser).

Class names say nothing reliable: one class serves many kinds, and the kinds moved between classes from
transformers 4 to 5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

SPACE_MARKER = "\u2581"  # SentencePiece's, where the tokenizer names no other
WORD_PIECE_PREFIX = "##"

# What changes the characters themselves. Other steps (Prepend, Strip, spaces to markers) place word borders.
_CHARACTER_STEPS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer", "Replace"),
}


@dataclass(frozen=True)
class Style:
    """How tokens spell text. At most one of ``byte_level``, ``space`` and ``implied_space`` is set.

    Attributes:
        byte_level: every character stands for a byte (GPT-2's alphabet: GPT-2, Qwen, Llama 3, LLaDA).
        space: the character that stands for a space (SentencePiece), or None.
        byte_tokens: ``<0xNN>`` is a byte.
        implied_space: tokens are words, and decoding puts a space before each (WordPiece, WordLevel).
        continuation: the prefix of those that continue a word instead (WordPiece), or None.
        cleanup: decoding takes the space before ``. , ! ?`` and English contractions away again. Tokens spell the
            same without it, so it does not count when styles are compared.
    """

    byte_level: bool = False
    space: str | None = None
    byte_tokens: bool = False
    implied_space: bool = False
    continuation: str | None = None
    cleanup: bool = field(default=False, compare=False)


def read_style(tokenizer: PreTrainedTokenizerBase) -> Style:
    """The style of any tokenizer; pieces of an unknown decoder are taken literally."""
    cleanup = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    backend = backend_of(tokenizer)
    if backend is None:
        return _style_in_python(tokenizer, cleanup)
    decoder = list(_steps(backend.decoder))
    steps = decoder or [*_steps(backend.pre_tokenizer), *_steps(backend.normalizer)]
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return Style(byte_level=True)
    byte_tokens = "ByteFallback" in kinds or bool(getattr(backend.model, "byte_fallback", False))
    marker = _space_marker(steps, decoding=bool(decoder))
    if marker is not None:
        return Style(space=marker, byte_tokens=byte_tokens)
    if "WordPiece" in kinds:
        step = kinds["WordPiece"]
        return Style(implied_space=True, continuation=step["prefix"], cleanup=cleanup or step["cleanup"])
    if not decoder:  # decoding joins with spaces then
        prefix = getattr(backend.model, "continuing_subword_prefix", None) or None  # Qwen's is ''
        return Style(implied_space=True, continuation=prefix, cleanup=cleanup)
    return Style(byte_tokens=byte_tokens)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the ``tokenizers`` library inside, or None (written in Python, or SentencePiece)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def character_steps(tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The normaliser's steps that change characters: case, accents, Unicode forms, replaced quotes ..."""
    backend = backend_of(tokenizer)
    if backend is None:
        # transformers 4's tokenizers in Python: only BERT's have a normaliser, and it follows this attribute.
        steps = [{"type": "Lowercase"}, {"type": "NFD"}, {"type": "StripAccents"}]
        return steps if getattr(tokenizer, "do_lower_case", False) else []
    chosen = []
    for step in _steps(backend.normalizer):
        if step["type"] == "BertNormalizer":
            step = {**step, "handle_chinese_chars": False}  # spaces around them: word borders, too
        elif step["type"] == "Replace" and (" " in step["pattern"].values() or SPACE_MARKER in step["content"]):
            continue
        if step["type"] in _CHARACTER_STEPS:
            chosen.append(step)
    return chosen


def _style_in_python(tokenizer: PreTrainedTokenizerBase, cleanup: bool) -> Style:
    if hasattr(tokenizer, "byte_decoder"):
        return Style(byte_level=True)
    if hasattr(tokenizer, "sp_model"):
        return Style(space=SPACE_MARKER, byte_tokens=True)
    if hasattr(tokenizer, "wordpiece_tokenizer"):
        return Style(implied_space=True, continuation=WORD_PIECE_PREFIX, cleanup=cleanup)
    return Style()


def _space_marker(steps: list[dict], decoding: bool) -> str | None:
    """The character written for a space: what the decoder turns into one, or a normaliser turns spaces into."""
    for step in steps:
        if step["type"] == "Metaspace":
            return step["replacement"]
        if step["type"] == "Replace":
            pattern, content = step["pattern"].get("String"), step["content"]
            text, marker = (content, pattern) if decoding else (pattern, content)
            if text == " " and marker:
                return marker
    return None


def _steps(component: Any) -> Iterator[dict]:
    """A component of the tokenizer as flat JSON steps; none for one that is missing or written in Python."""
    if component is None:
        return
    try:
        state = json.loads(component.__getstate__())  # what tokenizer.json says; the whole file takes a second
    except Exception:  # tokenizers raises a bare Exception for components that users wrote in Python
        return
    yield from _flat(state)


def _flat(step: dict) -> Iterator[dict]:
    for parts in ("decoders", "pretokenizers", "normalizers"):
        if parts in step:
            for part in step[parts]:
                yield from _flat(part)
            return
    yield step
