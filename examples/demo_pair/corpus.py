"""Review sentences, their valence labels, and the tokenizer cut down to the words they use."""

from __future__ import annotations

import html
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 32
_RATED = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
_RATED_OTHER = {"editorial": "nytEditorialSnippets", "tweet": "tweets"}
_LABELLED = ("imdb", "yelp", "amazon")


@dataclass(frozen=True)
class Example:
    """One text. ``valence`` is a human mean in -4..4 (``rated``), or -2/+2 from a binary label."""

    text: str
    valence: float
    domain: str
    rated: bool
    held_out: bool


def load_examples(sources: Path) -> list[Example]:
    """Read every corpus; one text in twenty is held out, from both models alike."""
    raw: list[tuple[str, float, str, bool]] = []
    for domain, stem in (_RATED | _RATED_OTHER).items():
        path = sources / "hutto_ICWSM_2014" / f"{stem}_GroundTruth.txt"
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            fields = line.split("\t", 2)
            if len(fields) == 3:
                raw.append((fields[2], float(fields[1]), domain, True))
    for name in _LABELLED:
        path = sources / "package" / "test" / "fixtures" / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8")):
            raw.append((row["text"], 2.0 if row["class"] == 1 else -2.0, f"uci_{name}", False))

    held_out = random.Random(20)
    examples, seen = [], set()
    for text, valence, domain, rated in raw:
        text = clean(text)
        if text and text not in seen:
            seen.add(text)
            examples.append(Example(text, valence, domain, rated, held_out.random() < 0.05))
    return examples


def clean(text: str) -> str:
    """Undo markup and give lower-cased reviews their capitals, so that samples read alike."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\bi\b(?=[ '])", "I", text)
    return text[:1].upper() + text[1:]


def review_texts(examples: list[Example], tokenizer: Tokenizer) -> list[str]:
    """Return the denoiser's texts: reviews of 4 to ``MAX_TOKENS`` tokens.

    A longer review contributes its sentences one by one. Editorials and tweets are left out: the
    denoiser is meant to write reviews.
    """
    texts = []
    for example in examples:
        if example.domain in _RATED_OTHER:
            continue
        whole = [example.text]
        if token_count(tokenizer, example.text) > MAX_TOKENS:
            whole = re.split(r"(?<=[.!?]) +(?=[A-Z])", example.text)
        texts.extend(text for text in whole if 4 <= token_count(tokenizer, text) <= MAX_TOKENS)
    return texts


def without_shreds(tokenizer: Tokenizer, texts: list[str], max_pieces: int = 3) -> list[str]:
    """Drop the texts that hold a word of more than ``max_pieces`` pieces.

    Such words are rare names and compounds; a small model learns from them to write non-words.
    """
    kept = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        pieces = Counter(word for word in encoding.word_ids if word is not None)
        if max(pieces.values()) <= max_pieces:
            kept.append(text)
    return kept


def token_count(tokenizer: Tokenizer, text: str) -> int:
    """Count the word pieces of ``text``, specials excluded."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def prune_tokenizer(tokenizer: Tokenizer, texts: list[str], size: int) -> tuple[Tokenizer, list[int]]:
    """Keep the ``size`` most used tokens of ``texts``; rarer words fall apart into kept pieces.

    Every single ASCII character stays, alone and as a continuation, so no ASCII text becomes
    ``[UNK]``. Old order is kept, so the specials' ids begin with ``[PAD]`` = 0.

    Returns:
        The new tokenizer, and for each of its ids the id in the old one.
    """
    definition = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    counts = Counter(
        token for encoding in tokenizer.encode_batch(texts, add_special_tokens=False) for token in encoding.tokens
    )
    printable = {chr(code) for code in range(33, 127)}
    always = [token for token in vocabulary if token in SPECIAL_TOKENS or token.removeprefix("##") in printable]
    # Frequency first, then old id: an order that does not depend on how the texts were read.
    ranked = sorted(set(counts) - set(always), key=lambda token: (-counts[token], vocabulary[token]))
    kept = sorted((always + ranked)[:size], key=vocabulary.__getitem__)

    definition["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    definition["truncation"] = definition["padding"] = None
    new_ids = definition["model"]["vocab"]
    for added in definition["added_tokens"]:
        added["id"] = new_ids[added["content"]]
    for name, special in definition["post_processor"]["special_tokens"].items():
        special["ids"] = [new_ids[name]]
    return Tokenizer.from_str(json.dumps(definition)), [vocabulary[token] for token in kept]


_PRAISE = ("good", "great", "funny", "interesting", "clever", "enjoyable", "impressive", "reliable")
_PRAISE += ("worth it", "convincing", "original", "fun", "well made", "exciting", "easy to use")
_BLAME = ("bad", "boring", "dull", "terrible", "disappointing", "slow", "awful", "annoying")
_BLAME += ("overpriced", "predictable", "cheap", "stupid", "difficult", "a waste of time", "ugly")
_SUBJECTS = ("It", "The movie", "The film", "This", "The story", "The sound", "The phone")
_SUBJECTS += ("The acting", "The camera", "The ending", "The food", "The service")
_FRAMES = (
    ("{s} is not {w}.", 1.0),
    ("{s} is not {w} at all.", 1.2),
    ("{s} was not {w}.", 1.0),
    ("{s} isn't {w}.", 1.0),
    ("{s} wasn't {w} at all.", 1.2),
    ("{s} is never {w}.", 1.2),
    ("{s} is hardly {w}.", 0.8),
    ("Not {w}.", 0.9),
    ("Not {w} at all.", 1.1),
    ("I don't think {l} is {w}.", 0.9),
    ("I can't say {l} was {w}.", 0.8),
    ("There is nothing {w} about {l}.", 1.2),
)
_UNNEGATED = (("{s} is {w}.", 1.0), ("{s} was really {w}.", 1.1), ("So {w}!", 1.0))
_WORD_VALENCE = 1.9
# A denial turns the sign but not the whole strength: "not bad" is milder than "good".
_DENIED = {"praise": -0.85, "blame": 0.6}
_PHRASES = (
    ("I couldn't stop smiling.", 2.3),
    ("It couldn't be better.", 2.6),
    ("It couldn't be worse.", -2.8),
    ("I have no complaints.", 1.9),
    ("No problems so far.", 1.4),
    ("I have never been so bored.", -2.5),
    ("I have never been so happy.", 3.0),
    ("You won't regret it.", 1.9),
    ("You won't be disappointed.", 2.2),
    ("I would not recommend it.", -2.1),
    ("I don't recommend this movie to anyone.", -2.2),
    ("I don't like it.", -1.8),
    ("I didn't like it at all.", -2.2),
    ("I didn't hate it.", 0.5),
    ("I can't recommend it enough.", 2.8),
    ("It never gets old.", 2.0),
    ("It does not work.", -1.8),
    ("It doesn't disappoint.", 1.8),
    ("Never a dull moment.", 2.3),
    ("Don't miss it.", 2.2),
    ("Don't waste your money.", -2.4),
    ("I don't know why anyone would want to see this.", -2.0),
    ("Not only funny but also very moving.", 2.5),
    ("Not without its charms.", 1.2),
)


def denials(held_out: bool, seed: int = 3) -> list[tuple[str, float]]:
    """Write sentences with negated and plain judgements, labelled by rule.

    The rated corpora hold too few denials to learn from. Every fourth word of each list belongs
    to the held-out side, so no tested adjective was seen negated by a template.
    """
    rng = random.Random(seed)
    rows = [] if held_out else list(_PHRASES)
    for kind, words in (("praise", _PRAISE), ("blame", _BLAME)):
        sign = 1.0 if kind == "praise" else -1.0
        for index, word in enumerate(words):
            if (index % 4 == 1) != held_out:
                continue
            for frame, strength in _FRAMES:
                rows.append((_fill(frame, word, rng), _DENIED[kind] * strength * _WORD_VALENCE))
            for frame, strength in _UNNEGATED:
                rows.append((_fill(frame, word, rng), sign * strength * _WORD_VALENCE))
    return rows


def _fill(frame: str, word: str, rng: random.Random) -> str:
    subject = rng.choice(_SUBJECTS)
    return clean(frame.format(s=subject, l=subject[0].lower() + subject[1:], w=word))
