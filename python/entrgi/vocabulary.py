"""Tokens of one model as seen by another: which ids a denoiser may draw, and what the reward reads there."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MISSING_ROWS = ("unk", "zero")


def undecodable(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """bool [vocab_size], true at ids without a token (padding rows of the denoiser's output layer)."""
    known = torch.tensor(sorted(tokenizer.get_vocab().values()))
    result = torch.ones(vocab_size, dtype=torch.bool)
    result[known[known < vocab_size]] = False
    return result


def align_embedding(
    weight: Tensor,
    reward_tokenizer: PreTrainedTokenizerBase,
    denoiser_tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    missing: str = "unk",
) -> Tensor:
    """The reward model's input embedding [vocab_size, d], one row per id of the denoiser.

    Ids without a token (padding rows of the denoiser's output layer) get the row of the reward's unknown
    token (of its end-of-sequence token where it has none, as published), or zeros.

    Args:
        weight: [V_reward, d], the reward model's input embedding. Returned as is where nothing must change.
        vocab_size: width V of the denoiser's logits.
        missing: ``unk`` or ``zero``.

    Raises:
        ValueError: where the two tokenizers differ, for an unknown ``missing``, or where ``unk`` is asked for
            and the reward tokenizer has neither an unknown nor an end-of-sequence token.
    """
    if missing not in MISSING_ROWS:
        raise ValueError(f"missing must be one of {', '.join(MISSING_ROWS)}, got {missing!r}")
    ours, theirs = denoiser_tokenizer.get_vocab(), reward_tokenizer.get_vocab()
    if ours != theirs:
        shared = len(ours.items() & theirs.items())
        raise ValueError(
            f"reward: its vocabulary ({len(theirs)} tokens) is not the denoiser's ({len(ours)} tokens): "
            f"{shared} have the same id in both. Vocabulary alignment between different tokenizers is not "
            "available yet"
        )
    if max(theirs.values()) >= weight.shape[0]:
        raise ValueError(
            f"reward: its embedding has {weight.shape[0]} rows, its tokenizer ids up to {max(theirs.values())}"
        )
    unknown = undecodable(denoiser_tokenizer, vocab_size)
    if not unknown.any():
        return weight[:vocab_size]
    aligned = weight.new_zeros(vocab_size, weight.shape[1])
    rows = min(vocab_size, weight.shape[0])
    aligned[:rows] = weight[:rows]
    row = weight[_unknown_id(reward_tokenizer)] if missing == "unk" else torch.zeros_like(weight[0])
    aligned[unknown.to(weight.device)] = row
    return aligned


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token_id in (tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token_id is not None:  # id 0 is an id
            return token_id
    raise ValueError("missing='unk': the reward tokenizer has no unknown and no end-of-sequence token; use 'zero'")
