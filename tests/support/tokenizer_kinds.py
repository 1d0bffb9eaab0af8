"""Tokenizers of every kind over hand-written tokens. Nothing is merged: they exist to be compared and to decode."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROLES = {"eos": "eos_token", "pad": "pad_token", "bos": "bos_token", "cls": "cls_token"}
ROLES |= {"sep": "sep_token", "unk": "unk_token", "mask": "mask_token"}


def numbered(tokens):
    return {token: i for i, token in enumerate(tokens)}


def wrapped(backend, **roles):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{ROLES[role]: token for role, token in roles.items()})


def byte_level(tokens, normalizer=None, **roles):
    """As GPT-2, Qwen and Llama 3 spell: a space is "Ġ", "é" is "Ã©"."""
    backend = Tokenizer(models.BPE(numbered(tokens), []))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, **roles)


def sentence_piece(tokens, normalizer=None, **roles):
    """As Llama 2 and Gemma spell: a space is "▁", a byte "<0x0A>"."""
    backend = Tokenizer(models.BPE(numbered(tokens), [], byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = spaces if normalizer is None else normalizers.Sequence([normalizer, spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    return wrapped(backend, **roles)


def unigram(tokens, **roles):
    """As T5 and XLM-R spell: a space is "▁"; no tokens for bytes."""
    backend = Tokenizer(models.Unigram([(token, 0.0) for token in tokens], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrapped(backend, **roles)


def word_piece(tokens, lowercase=False, cleanup=True, **roles):
    """As BERT spells: "##ing" continues a word."""
    roles = {"unk": "[UNK]", **roles}
    vocabulary = numbered(tokens if "[UNK]" in tokens else ["[UNK]", *tokens])
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return wrapped(backend, **roles)


def word_level(tokens, **roles):
    """Whole words between spaces."""
    roles = {"unk": "[UNK]", **roles}
    vocabulary = numbered(tokens if "[UNK]" in tokens else ["[UNK]", *tokens])
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, **roles)


def trained_byte_level(texts, size):
    """Byte-level BPE that can spell every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return wrapped(backend, eos="<|end|>")


def trained_sentence_piece(texts, size):
    """SentencePiece-like BPE that can spell every text: characters that it lacks become byte tokens."""
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    # The trainer makes its special tokens added ones. Bytes are not: raw text "<0x41>" must not become one.
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = parts["added_tokens"][:2]
    return wrapped(Tokenizer.from_str(json.dumps(parts)), unk="<unk>", eos="</s>")


def trained_word_piece(texts, size, lowercase=False):
    """BERT-like pieces of the texts' words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return wrapped(backend, **roles)
