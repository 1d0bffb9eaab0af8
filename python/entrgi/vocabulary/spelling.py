"""The tokens of one tokenizer as the bytes that they add to a text."""

from __future__ import annotations

import json
import re
from dataclasses import astuple
from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer, Normalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerBase

from entrgi.vocabulary.pieces import byte_alphabet
from entrgi.vocabulary.style import Style, backend_of, character_steps, read_style

ROLES = ("eos", "pad", "bos", "cls", "sep", "unk", "mask")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED_UP = (b" .", b" ?", b" !", b" ,", b" n't", b" 'm", b" 's", b" 've", b" 're")
# Characters of the alphabet to their bytes, as Latin-1; all other characters below 256 to one that Latin-1 lacks.
_TO_LATIN = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for char, byte in byte_alphabet().items()}
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}


def state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """Equal for a tokenizer only as long as its :class:`Vocabulary` stays the same; cheap."""
    parts = (len(tokenizer), astuple(read_style(tokenizer)), character_steps(tokenizer))
    return *parts, _roles(tokenizer), sorted(tokenizer.all_special_ids)


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}


class Vocabulary:
    """What the tokens of a tokenizer stand for.

    Attributes:
        style: how they spell text.
        tokens: id -> token, as the tokenizer spells it; ids may have gaps.
        added: token -> id of tokens that are recognised in raw text as a whole; special tokens are among them.
        special: ids of special tokens; they stand for no text.
        roles: role -> id, of the :data:`ROLES` that the tokenizer fills.
        steps: the normaliser's steps that change characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.style: Style = read_style(tokenizer)
        self.tokens: dict[int, str] = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        self.steps = character_steps(tokenizer)
        self.roles: dict[str, int] = {role: i for role, i in _roles(tokenizer).items() if i in self.tokens}
        added = {i: token for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if i in self.tokens}
        self.special: set[int] = {i for i, token in added.items() if token.special} | set(self.roles.values())
        self.special |= set(tokenizer.all_special_ids) & self.tokens.keys()
        self.added: dict[str, int] = {self.tokens[i]: i for i in sorted(self.special | added.keys(), reverse=True)}
        self._isolated: dict[str, bool] = {}
        self._unreadable: set[str] = set()
        backend = backend_of(tokenizer)
        if backend is not None:
            self._word_borders = (backend.normalizer, backend.pre_tokenizer)
            return
        self._word_borders = (BertNormalizer(), BertPreTokenizer())  # of the only word pieces written in Python
        if self.style == Style():  # a tokenizer of its own kind: tokens are text where it says so itself
            convert = tokenizer.convert_tokens_to_string
            self._unreadable = {token for token in self.tokens.values() if convert([token]) != token}

    def is_byte_token(self, token: str) -> bool:
        """Whether the token is a byte in SentencePiece's spelling, ``<0x0A>``."""
        return self.style.byte_tokens and token[:3] == "<0x" and _BYTE_TOKEN.fullmatch(token) is not None

    def starts_word(self, token: str) -> bool:
        """Whether decoding puts a space before the token that the token does not spell."""
        prefix = self.style.continuation
        return self.style.implied_space and (prefix is None or not token.startswith(prefix))

    def text(self, token: str) -> bytes:
        """The bytes that the token spells, without the implied space of a word's start; none where unknown."""
        style = self.style
        if style.byte_level:
            if token in self.added:
                return token.encode()
            try:
                return token.translate(_TO_LATIN).encode("latin-1")
            except UnicodeEncodeError:  # not in the alphabet: taken literally, as decoders do
                return token.encode(errors="surrogatepass")
        if self.is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        if style.space is not None:
            return token.replace(style.space, " ").encode(errors="surrogatepass")
        if style.continuation is not None and token.startswith(style.continuation):
            return token[len(style.continuation) :].encode(errors="surrogatepass")
        return b"" if token in self._unreadable else token.encode(errors="surrogatepass")

    def readings(self, token: str) -> list[bytes]:
        """The bytes that the token adds inside a decoded text, then what it may be taken for instead.

        Only tokens with an implied space have two readings, with the space and without. The space comes first
        unless the decoder's clean-up removes it, as before a full stop.
        """
        text = self.text(token)
        if not text or not self.starts_word(token):
            return [text] if text else []
        spaced = b" " + text
        cleaned = self.style.cleanup and spaced.startswith(_CLEANED_UP)
        return [text, spaced] if cleaned else [spaced, text]

    def normalised(self, text: bytes) -> bytes:
        """``text`` as this tokenizer would read it: lower case where it is uncased, and so on.

        Bytes that are no complete characters stay as they are: no normaliser reaches them.
        """
        if self._normaliser is None or (self._keeps_ascii and text.isascii()):
            return text
        try:
            return self._normaliser.normalize_str(text.decode()).encode()
        except UnicodeDecodeError:
            return text

    def isolates(self, character: str) -> bool:
        """Whether the tokenizer starts a new word at ``character`` right behind a letter, as at punctuation."""
        known = self._isolated.get(character)
        if known is None:
            normalizer, splitter = self._word_borders
            text = f"a{character}" if normalizer is None else normalizer.normalize_str(f"a{character}")
            known = splitter is not None and len(splitter.pre_tokenize_str(text)) > 1
            self._isolated[character] = known
        return known

    @cached_property
    def _keeps_ascii(self) -> bool:
        return {step["type"] for step in self.steps} <= _UNICODE_FORMS

    @cached_property
    def _normaliser(self) -> Normalizer | None:
        if not self.steps:
            return None
        model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
        normaliser = {"type": "Sequence", "normalizers": self.steps}
        return Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": normaliser, "model": model})).normalizer
