"""How much of a denoiser's vocabulary a reward understands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entrgi.vocabulary.alignment import Alignment
from entrgi.vocabulary.spelling import Vocabulary

_ROWS = 64  # of [n, V] converted at a time


@dataclass(frozen=True)
class UnmappedToken:
    """A token of the denoiser without a counterpart.

    Attributes:
        id: its id.
        token: as the tokenizer spells it, or None for an id without a token.
        text: what it adds inside a text; bytes that are no character as ``\\xf0``.
        mass: its mean probability over the sample, or None without one.
    """

    id: int
    token: str | None
    text: str
    mass: float | None


@dataclass(frozen=True)
class Coverage:
    """How much of a denoiser's vocabulary has a counterpart in a reward's.

    Attributes:
        vocab_size: V, width of the denoiser's logits.
        tokens: ids below V with a token.
        mapped: those with a counterpart.
        identical: both vocabularies are the same.
        positions: rows of the sample; 0 without one.
        mass: share of the sample's probability mass that lies on mapped ids, or None without a sample.
        unmapped: the ids without a counterpart that hold most of that mass, descending; without a sample the
            lowest ids that have a token.
    """

    vocab_size: int
    tokens: int
    mapped: int
    identical: bool
    positions: int
    mass: float | None
    unmapped: tuple[UnmappedToken, ...]

    @property
    def share(self) -> float:
        """Share of the ids with a token that have a counterpart."""
        return self.mapped / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "share": self.share, "unmapped": [asdict(token) for token in self.unmapped]}

    def __str__(self) -> str:
        lines = [f"ids: {self.mapped} of {self.tokens} have a counterpart ({self.share:.2%})"]
        if self.identical:
            lines[0] += ", the vocabularies are the same"
        if self.mass is not None:
            lines.append(f"probability mass on them: {self.mass:.4%} (mean of {self.positions} positions)")
        if self.unmapped:
            lines.append("without a counterpart:")
        for token in self.unmapped:
            mass = "" if token.mass is None else f"{token.mass:>12.4%}"
            lines.append(f"{mass}{token.id:>9}  {'(no token)' if token.token is None else repr(token.text)}")
        return "\n".join(lines)


def coverage(
    alignment: Alignment,
    denoiser_tokenizer: PreTrainedTokenizerBase,
    probabilities: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    top: int = 10,
) -> Coverage:
    """How much of the vocabulary, and of what the denoiser predicts, the reward understands.

    Args:
        alignment: from :func:`entrgi.vocabulary.align`.
        denoiser_tokenizer: the denoiser's tokenizer.
        probabilities: [n, V], rows of a sample; or
        logits: [n, V], their softmax at temperature 1 is the sample.
        top: how many of the ids without a counterpart to name.

    Raises:
        ValueError: for both samples at once, one of another shape, without rows, or that is no distribution.
    """
    width = len(alignment.ids)
    if top < 0:
        raise ValueError(f"top must be >= 0, got {top}")
    name, sample = ("logits", logits) if logits is not None else ("probabilities", probabilities)
    if logits is not None and probabilities is not None:
        raise ValueError("probabilities: expected one of probabilities and logits, got both")
    mean = None if sample is None else _mean(name, sample, width)

    vocabulary = Vocabulary(denoiser_tokenizer)
    known = torch.zeros(width, dtype=torch.bool)
    known[torch.tensor([i for i in vocabulary.tokens if i < width], dtype=torch.long)] = True
    has_counterpart = alignment.ids >= 0
    if mean is None:
        ids = (known & ~has_counterpart).nonzero().flatten()[:top].tolist()
    else:
        order = torch.sort(mean.masked_fill(has_counterpart, -1.0), descending=True, stable=True).indices[:top].tolist()
        ids = [i for i in order if not has_counterpart[i] and mean[i] > 0]
    return Coverage(
        vocab_size=width,
        tokens=int(known.sum()),
        mapped=int(has_counterpart.sum()),
        identical=alignment.identical,
        positions=0 if sample is None else sample.shape[0],
        mass=None if mean is None else float(mean[has_counterpart].sum() / mean.sum()),
        unmapped=tuple(_describe(vocabulary, i, mean) for i in ids),
    )


def _mean(name: str, sample: Tensor, width: int) -> Tensor:
    """Mean distribution of the rows, fp64 [V] on the CPU."""
    if sample.ndim != 2 or sample.shape[0] == 0 or sample.shape[1] != width:
        raise ValueError(f"{name}: expected [n, {width}] with n > 0, got {list(sample.shape)}")
    total = torch.zeros(width, dtype=torch.float64)
    for rows in sample.split(_ROWS):
        rows = rows.float().softmax(dim=-1) if name == "logits" else rows.float()
        sums = rows.sum(dim=-1)
        if not bool((rows >= 0).all()) or not bool(((sums - 1).abs() < 0.02).all()):  # bf16 sums are that far off
            raise ValueError(f"{name}: expected rows that are distributions, got sums of {sums[:4].tolist()}")
        total += rows.sum(dim=0, dtype=torch.float64).cpu()
    return total / sample.shape[0]


def _describe(vocabulary: Vocabulary, token_id: int, mean: Tensor | None) -> UnmappedToken:
    token = vocabulary.tokens.get(token_id)
    readings = [] if token is None else vocabulary.readings(token)
    text = readings[0].decode("utf-8", errors="backslashreplace") if readings else ""
    return UnmappedToken(token_id, token, text, None if mean is None else float(mean[token_id]))
