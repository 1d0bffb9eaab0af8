"""How single tokens are shown: the text that each adds to its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character


def sequence_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The decoded text of consecutive tokens, cut at their borders, with the spaces that belong to them.

    A token that holds a part of a character only (byte-level tokenizers) is shown as its bytes, such as
    ``\\xf0\\x9f``; apart from these the joined pieces are the decoded text. Special tokens are spelled out.

    Args:
        ids: of one sequence, from its middle or its start.
    """
    anchor = _anchor(tokenizer)
    before = _decoded(tokenizer, anchor)
    text = _decoded(tokenizer, [*anchor, *ids])
    place = len(before) if text.startswith(before) else 0
    known: dict[int, str] = {}
    pieces = []
    for token_id in ids:
        if token_id not in known:
            known[token_id] = _piece(tokenizer, token_id, anchor, before)
        piece = known[token_id]
        if REPLACEMENT in piece:
            pieces.append(_byte_spelling(tokenizer, token_id))
            continue
        # A piece is known behind a letter; elsewhere its space may be missing: at a start, or where word pieces are
        # cleaned up, before punctuation.
        for form in (piece, piece.lstrip(" ")):
            if form and text.startswith(form, place):
                piece, place = form, place + len(form)
                break
        pieces.append(piece)
    return pieces


def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])


def _piece(tokenizer: PreTrainedTokenizerBase, token_id: int, anchor: list[int], before: str) -> str:
    text = _decoded(tokenizer, [*anchor, token_id])
    return text[len(before) :] if text.startswith(before) else _decoded(tokenizer, [token_id])


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids))  # of one text


def _byte_spelling(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Whole characters as they are, other bytes as ``\\xf0``."""
    spelling = cast(str, tokenizer.convert_ids_to_tokens(token_id))  # of one id
    if spelling.startswith("<0x") and spelling.endswith(">"):  # byte fallback, as in SentencePiece
        return f"\\x{spelling[3:-1].lower()}"
    table = byte_alphabet()
    if all(char in table for char in spelling):
        return bytes(table[char] for char in spelling).decode("utf-8", errors="backslashreplace")
    return spelling


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level spelling (GPT-2): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
