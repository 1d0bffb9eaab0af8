"""Whether a reward over embeddings is its model's own score over ids.

Not every model reads ids for their embedding alone: some pool where the last id that is no padding stands, some
count the ids of a kind and scale by that, some mix padding in whatever the mask says. Over embeddings these give
another number without an error, so every reward scores two texts both ways before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entrgi.models.errors import reason_of

if TYPE_CHECKING:
    from entrgi.rewards.embedding import EmbeddingReward

Row = tuple[list[int], int]

# How far a number may be rounded, relative to it. float32: products in TF32; parts of float64 models are float32.
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10}
_ROUNDING_OF_OTHERS = 2**-12
_ROUNDING_QUANTISED = 2**-5
# What rounding the embedding alone moves, times this, is what rounding all layers may move.
_MARGIN = 16
_PERTURBED = 2


def check_own_score(reward: EmbeddingReward, rows: Sequence[Row], own: Callable[[Row], Tensor]) -> None:
    """Raise ValueError unless ``reward`` gives the texts in ``rows`` what their model gives them over ids.

    Each text is scored over ids alone and without padding, which is what its score is; over embeddings alone and in
    one batch, the shorter padded. What is tolerated is measured: ``_MARGIN`` times what changes of the embedding of
    the size of its dtype's rounding do to the score, and the rounding of the score itself. Global random state stays
    as it is.

    Args:
        rows: ids and number of ids before what is judged, of texts of different lengths.
        own: such a row -> the model's own score of it, [1].
    """
    device = reward.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            expected = torch.cat([own(row) for row in rows])
            again = own(rows[0])
            alone = torch.cat([reward.score_rows([row]) for row in rows])
            padded = reward.score_rows(rows)
            rounding = _rounding(reward)
            moved = _perturbed(reward, rows, rounding) - padded
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"reward: {reward.name} cannot be read over embeddings: {reason_of(error)}") from error
    _check_repeated(reward.name, len(rows[0][0]), expected[:1], again, _rounding(reward))
    noise, largest = moved.double().square().mean().sqrt(), expected.double().abs().max()
    allowed = float(_MARGIN * noise + 2 * rounding * largest)
    longest = max(len(ids) for ids, _ in rows)
    for scores, padding in ((alone, "alone"), (padded, f"in a batch padded to {longest}")):
        for (ids, _), got, wanted in zip(rows, scores.tolist(), expected.tolist(), strict=True):
            if not abs(got - wanted) <= allowed:
                raise ValueError(
                    f"reward: {reward.name} gives a text of {len(ids)} tokens {got:.6g} over embeddings ({padding}) "
                    f"and {wanted:.6g} over ids, expected the same up to {allowed:.2g}: it reads more than the "
                    "embeddings of a text, so guidance would follow another score than its own"
                )


def _check_repeated(name: str, length: int, first: Tensor, second: Tensor, rounding: float) -> None:
    """Raise ValueError where one text's two scores differ by more than the order in which sums are taken."""
    first, second = first.item(), second.item()
    if abs(first - second) > rounding * max(abs(first), abs(second)):
        raise ValueError(
            f"reward: {name} gives the same text of {length} tokens two scores, {first:.6g} and {second:.6g}, expected "
            "one: it draws at random, or a part of it is in training mode"
        )


def _rounding(reward: EmbeddingReward) -> float:
    """Of the least precise weights."""
    dtypes = {parameter.dtype for parameter in reward.model.parameters()}
    if getattr(reward.model, "is_quantized", False) or any(dtype.itemsize == 1 for dtype in dtypes):
        return _ROUNDING_QUANTISED
    return max(_ROUNDING.get(dtype, _ROUNDING_OF_OTHERS) for dtype in dtypes)


def _perturbed(reward: EmbeddingReward, rows: Sequence[Row], size: float) -> Tensor:
    """Scores [_PERTURBED, n] of the padded batch with every number of the embeddings changed by +-``size`` of it."""
    copies = [row for _ in range(_PERTURBED) for row in rows]
    embeds, valid = reward.padded([ids for ids, _ in copies])
    signs = torch.randint(0, 2, embeds.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factor = 1 + size * signs.to(embeds.device, embeds.dtype)
    return reward.score_padded(embeds * factor, valid, [begin for _, begin in copies]).view(_PERTURBED, len(rows))
