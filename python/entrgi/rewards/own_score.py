"""Whether a reward over embeddings is its model's own score over ids.

Not every model reads ids for their embedding alone: some pool where the last id that is no padding stands, some
count the ids of a kind and scale by that, some mix padding in whatever the mask says. Over embeddings these give
another number without an error, so every reward scores two texts both ways before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrgi.models.errors import reason_of
from entrgi.prompts import Completion
from entrgi.rewards.protocol import Head
from entrgi.rewards.reader import Reader, Row
from entrgi.tokenizing import decode_ids

# How far a number may be rounded, relative to it. float32: products in TF32; parts of float64 models are float32.
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10}
_ROUNDING_OF_OTHERS = 2**-12
_ROUNDING_QUANTISED = 2**-5
# What rounding the embedding alone moves, times this, is what rounding all layers may move.
_MARGIN = 16
_PERTURBED = 2


class ModelHead(Head, Protocol):
    """A head whose model has a score of its own over ids."""

    model: PreTrainedModel

    def own_score(self, ids: Tensor, begin: int) -> Tensor:
        """The model's own score [1] of one text's ids, int64 [1, S], of which ``begin`` are not judged."""
        ...


def check_own_score(reader: Reader, head: ModelHead) -> None:
    """Raise ValueError unless ``head`` gives two texts what its model gives them over ids.

    Each text is scored over ids alone and without padding, which is what its score is; over embeddings alone and in
    one batch, the shorter padded. What is tolerated is measured: ``_MARGIN`` times what changes of the embedding of
    the size of its dtype's rounding do to the score, and the rounding of the score itself. Global random state stays
    as it is.
    """
    rows, device = probes(reader), reader.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            expected = torch.cat([_own(reader, head, row) for row in rows])
            again = _own(reader, head, rows[0])
            alone = torch.cat([head(*reader.batch([row])) for row in rows])
            padded = head(*reader.batch(rows))
            rounding = _rounding(head.model)
            moved = _perturbed(reader, head, rows, rounding) - padded
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"reward: {reader.name} cannot be read over embeddings: {reason_of(error)}") from error
    _check_repeated(reader.name, len(rows[0][0]), expected[:1], again, rounding)
    noise, largest = moved.double().square().mean().sqrt(), expected.double().abs().max()
    allowed = float(_MARGIN * noise + 2 * rounding * largest)
    longest = max(len(ids) for ids, _ in rows)
    for scores, padding in ((alone, "alone"), (padded, f"in a batch padded to {longest}")):
        for (ids, _), got, wanted in zip(rows, scores.tolist(), expected.tolist(), strict=True):
            if not abs(got - wanted) <= allowed:
                raise ValueError(
                    f"reward: {reader.name} gives a text of {len(ids)} tokens {got:.6g} over embeddings ({padding}) "
                    f"and {wanted:.6g} over ids, expected the same up to {allowed:.2g}: it reads more than the "
                    "embeddings of a text, so guidance would follow another score than its own"
                )


def _check_repeated(name: str, length: int, one: Tensor, other: Tensor, rounding: float) -> None:
    """Raise ValueError where one text's two scores differ by more than the order in which sums are taken."""
    first, second = one.item(), other.item()
    if abs(first - second) > rounding * max(abs(first), abs(second)):
        raise ValueError(
            f"reward: {name} gives the same text of {length} tokens two scores, {first:.6g} and {second:.6g}, expected "
            "one: it draws at random, or a part of it is in training mode"
        )


def _own(reader: Reader, head: ModelHead, row: Row) -> Tensor:
    return head.own_score(torch.tensor([row[0]], device=reader.device), row[1])


def _rounding(model: PreTrainedModel) -> float:
    """Of the least precise weights."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if getattr(model, "is_quantized", False) or any(dtype.itemsize == 1 for dtype in dtypes):
        return _ROUNDING_QUANTISED
    return max(_ROUNDING.get(dtype, _ROUNDING_OF_OTHERS) for dtype in dtypes)


def _perturbed(reader: Reader, head: ModelHead, rows: Sequence[Row], size: float) -> Tensor:
    """Scores [_PERTURBED, n] of the padded batch with every number of the embeddings changed by +-``size`` of it."""
    embeds, valid, places = reader.batch([row for _ in range(_PERTURBED) for row in rows])
    signs = torch.randint(0, 2, embeds.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factor = 1 + size * signs.to(embeds.device, embeds.dtype)
    return head(embeds * factor, valid, places).view(_PERTURBED, len(rows))


def probes(reader: Reader) -> list[Row]:
    """Two texts of the tokenizer's own tokens, of different lengths, as ``reader`` reads them.

    Raises:
        ValueError: where what stands around every text has a token that the model has no embedding of.
    """
    try:
        return _probes(reader)
    except ValueError:
        raise
    except Exception as error:  # a chat template may be anything
        raise ValueError(f"reward: the tokenizer of {reader.name} cannot read a text: {reason_of(error)}") from error


def _probes(reader: Reader) -> list[Row]:
    tokenizer, limit = reader.tokenizer, reader.max_length
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    words = [i for i in range(min(reader.rows, len(tokenizer))) if i not in special] or [0]
    # Spread over the vocabulary, and not to be found in whole by a tokenizer that knows the plainest text only.
    spread = [words[i * (len(words) - 1) // 11] for i in range(12)]
    parts, prompt = [spread[:8], spread[8:11]], decode_ids(tokenizer, spread[11:])
    rows = []
    for part in parts:
        text = decode_ids(tokenizer, part)
        try:
            row = reader.whole(Completion(prompt, f"{prompt} {text}", text))
        except ValueError:  # no place for an answer, or nothing before it: an error where texts are given
            row = part, 1
        rows.append((reader.known(row[0]), row[1]))
    longest = len(rows[0][0])
    if limit is not None and longest > limit:
        rows[0], longest = (parts[0][:limit], 1), limit
    if len(rows[1][0]) >= longest > 1:
        rows[1] = parts[1][: max(2, longest // 2)], 1
    return rows
