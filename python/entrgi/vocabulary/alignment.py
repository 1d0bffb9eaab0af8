"""Which token of the reward stands for each token of the denoiser, and the embedding table that follows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entrgi.deprecation import renamed_keyword
from entrgi.tokenizing import named_id
from entrgi.vocabulary.spelling import Vocabulary, state_of

UNMAPPED_ROWS = ("unk", "zero")
FEW = 0.5  # a smaller share of mapped ids is worth a warning

# Roles that serve the same end where the reward lacks the role itself: BERT's [CLS] and [SEP] frame a text.
_ROLE_PREFERENCE = {"eos": ("eos", "sep"), "sep": ("sep", "eos"), "bos": ("bos", "cls"), "cls": ("cls", "bos")}


@dataclass(frozen=True)
class Alignment:
    """Token map from a denoiser to a reward.

    Attributes:
        ids: int64 [V] on the CPU, the reward's id for each of the denoiser's, or -1.
        identical: both have the same vocabulary and read it alike, so that every id with a token is mapped to itself.
    """

    ids: Tensor
    identical: bool


def undecodable(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """bool [vocab_size], true at ids without a token: padding rows of the output layer, gaps between ids.

    Decoding such an id gives nothing or fails; the sampler never draws one.
    """
    known = torch.tensor(sorted(tokenizer.get_vocab().values()), dtype=torch.long)
    result = torch.ones(vocab_size, dtype=torch.bool)
    result[known[known < vocab_size]] = False
    return result


def align(
    denoiser_tokenizer: PreTrainedTokenizerBase, vocab_size: int, reward_tokenizer: PreTrainedTokenizerBase
) -> Alignment:
    """Map each id of the denoiser to the reward's token for the same text. The first rule that applies decides:

    1. Added and special tokens go to the added or special token that is spelled the same.
    2. Special tokens go to the one with the same role: eos, pad, bos, cls, sep, unk, mask (in this order for an id
       with several). Where the reward lacks it, eos and sep stand for each other, and so do bos and cls.
       Other special tokens have no counterpart.
    3. Where both tokenizers spell text in the same way, the same spelling is the same token.
    4. All other tokens are compared by the bytes that they add inside a text, after the reward's normaliser (an
       uncased reward reads "The" as "the"; what its normaliser never lets through is no target).
       Tokens of WordPiece and WordLevel vocabularies that start a word carry a space, as in their decoded text:
       the denoiser's "the" is " the", or "the" where the reward has only that (and "." rather than " ." where decoding
       attaches it). The reward's "the" is " the"; for "the" within a word it is taken where there is no "##the",
       and first of all where the reward's pre-tokenizer splits before it anyway (punctuation).

    Of several reward tokens with the same bytes, added ones go first, then whole pieces, then ``<0xNN>``, and the
    lowest id among those. Several ids of the denoiser may share one of the reward's.

    Args:
        denoiser_tokenizer, reward_tokenizer: of any kind: byte-level BPE, SentencePiece, WordPiece, Unigram,
            WordLevel.
        vocab_size: width V of the denoiser's logits.

    Raises:
        ValueError: where no ordinary token of the denoiser has a counterpart.

    Warns:
        UserWarning: where less than half of the denoiser's tokens have one.
    """
    state = (vocab_size, state_of(denoiser_tokenizer), state_of(reward_tokenizer))
    made = _MADE.setdefault(denoiser_tokenizer, WeakKeyDictionary())
    found = made.get(reward_tokenizer, (None,))
    if found[0] != state:
        found = made[reward_tokenizer] = (state, *_align(denoiser_tokenizer, vocab_size, reward_tokenizer))
    _, alignment, known = found  # what is kept may be of another thread's denoiser by now
    share = int((alignment.ids >= 0).sum()) / known if known else 1.0
    if share < FEW:
        warnings.warn(
            f"reward: {share:.1%} of the denoiser's {known} tokens have a counterpart in its vocabulary; "
            "it reads the others as unknown (see entrgi.vocabulary.coverage)",
            stacklevel=2,
        )
    return alignment


# Alignments by denoiser's and reward's tokenizer: a large one takes up to a second, and every generation asks.
_MADE: WeakKeyDictionary = WeakKeyDictionary()


def _align(
    denoiser_tokenizer: PreTrainedTokenizerBase, vocab_size: int, reward_tokenizer: PreTrainedTokenizerBase
) -> tuple[Alignment, int]:
    """See :func:`align`; also how many of the denoiser's ids have a token."""
    ours, theirs = Vocabulary(denoiser_tokenizer), Vocabulary(reward_tokenizer)
    known = [i for i in ours.tokens if i < vocab_size]
    if (ours.tokens, ours.style, ours.steps) == (theirs.tokens, theirs.style, theirs.steps):
        return Alignment(_as_tensor({i: i for i in known}, vocab_size), identical=True), len(known)
    pairs = _special_pairs(ours, theirs)
    pairs |= _ordinary_pairs(ours, theirs, [i for i in known if i not in pairs and i not in ours.special])
    if not any(i < vocab_size and i not in ours.special for i in pairs):
        raise ValueError(
            f"reward: no token of its tokenizer ({_describe(reward_tokenizer, theirs)}) stands for the same text as "
            f"one of the denoiser's ({_describe(denoiser_tokenizer, ours)}), expected vocabularies that overlap"
        )
    return Alignment(_as_tensor(pairs, vocab_size), identical=False), len(known)


@renamed_keyword("missing", "unmapped")
def align_embedding(
    weight: Tensor, alignment: Alignment, unmapped: str, reward_tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """The reward model's embedding [V, d], one row per id of the denoiser.

    Args:
        weight: [V_reward, d]. A view of it is returned where nothing must change.
        alignment: from :func:`align`.
        unmapped: the row of ids without a counterpart: ``unk`` takes the reward's unknown token (its
            end-of-sequence token where it has none, as published), ``zero`` takes zeros.

    Raises:
        ValueError: for an unknown ``unmapped``, for an embedding with fewer rows than the ids that it is asked for,
            or where ``unk`` is asked for and the reward tokenizer has neither an unknown nor an end-of-sequence
            token.
    """
    if unmapped not in UNMAPPED_ROWS:
        raise ValueError(f"unmapped must be one of {', '.join(UNMAPPED_ROWS)}, got {unmapped!r}")
    ids, rows = alignment.ids, weight.shape[0]
    last = int(ids.max())
    if last >= rows:
        token = reward_tokenizer.convert_ids_to_tokens(last)
        raise ValueError(
            f"reward: its embedding has {rows} rows, its tokenizer ids up to {last}, which stands for {token!r}"
        )
    if torch.equal(ids, torch.arange(len(ids))):
        return weight[: len(ids)]
    aligned = weight.index_select(0, ids.clamp(min=0).to(weight.device))
    absent = ids < 0
    if absent.any():
        row = weight[_unknown_id(reward_tokenizer, rows)] if unmapped == "unk" else torch.zeros_like(weight[0])
        aligned[absent.to(weight.device)] = row
    return aligned


def _special_pairs(ours: Vocabulary, theirs: Vocabulary) -> dict[int, int]:
    """Added and special tokens with the same spelling, then those with the same role."""
    pairs = {i: theirs.added[token] for token, i in ours.added.items() if token in theirs.added}
    for role, i in ours.roles.items():
        for counterpart in _ROLE_PREFERENCE.get(role, (role,)):
            if i not in pairs and counterpart in theirs.roles:
                pairs[i] = theirs.roles[counterpart]
    return pairs


def _ordinary_pairs(ours: Vocabulary, theirs: Vocabulary, wanted: list[int]) -> dict[int, int]:
    """Tokens that stand for the same text."""
    pairs, rest = {}, wanted
    if ours.style == theirs.style:
        same_characters = ours.steps == theirs.steps
        spelled = {token: j for j, token in theirs.tokens.items() if token not in theirs.added}
        rest = []
        for i in wanted:
            token = ours.tokens[i]
            j = None if token in ours.added else spelled.get(token)
            if j is not None and (same_characters or _survives(theirs, token)):
                pairs[i] = j
            else:
                rest.append(i)
    by_text = _by_text(theirs) if rest else {}
    for i in rest:
        for reading in ours.readings(ours.tokens[i]):
            j = by_text.get(theirs.normalised(reading))
            if j is not None:
                pairs[i] = j
                break
    return pairs


def _survives(vocabulary: Vocabulary, token: str) -> bool:
    """Whether the tokenizer's own normaliser lets the token's text through."""
    text = vocabulary.text(token)
    return vocabulary.normalised(text) == text


def _by_text(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The reward's token for the bytes of a text."""
    added, pieces, continuing, bytewise, unspaced = levels = [{} for _ in range(5)]
    for i, token in sorted(vocabulary.tokens.items()):
        text = vocabulary.text(token)
        if i in vocabulary.special or not text:
            continue
        if token in vocabulary.added:
            added.setdefault(text, i)
        if vocabulary.starts_word(token):
            pieces.setdefault(b" " + text, i)
            (pieces if vocabulary.isolates(token[0]) else unspaced).setdefault(text, i)
        elif vocabulary.is_byte_token(token):
            bytewise.setdefault(text, i)
        else:
            (continuing if vocabulary.style.implied_space else pieces).setdefault(text, i)
    result: dict[bytes, int] = {}
    for level in reversed(levels):  # the first level that knows a text has the last word
        result.update(level)
    return result


def _as_tensor(pairs: dict[int, int], vocab_size: int) -> Tensor:
    ids = torch.full((vocab_size,), -1, dtype=torch.long)
    inside = {i: j for i, j in pairs.items() if i < vocab_size}
    ids[torch.tensor(list(inside.keys()), dtype=torch.long)] = torch.tensor(list(inside.values()), dtype=torch.long)
    return ids


def _describe(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> str:
    ordinary = [token for i, token in sorted(vocabulary.tokens.items()) if i not in vocabulary.special]
    name = f"{tokenizer.name_or_path!r}, " if tokenizer.name_or_path else ""
    return f"{name}{len(vocabulary.tokens)} tokens such as {', '.join(map(repr, ordinary[:3])) or 'none'}"


def _unknown_id(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    for token_id in (named_id(tokenizer, "unk"), named_id(tokenizer, "eos")):
        if token_id is not None:  # id 0 is an id
            if token_id >= rows:
                raise ValueError(
                    f"unmapped='unk': the reward's embedding has {rows} rows, its unknown id is {token_id}"
                )
            return token_id
    raise ValueError("unmapped='unk': the reward tokenizer has no unknown and no end-of-sequence token; use 'zero'")
