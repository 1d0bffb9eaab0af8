"""Tokens of one model as seen by another: which ids a denoiser may draw, and what the reward reads there."""

from entrgi.deprecation import former_names
from entrgi.vocabulary.alignment import UNMAPPED_ROWS, Alignment, align, align_embedding, undecodable
from entrgi.vocabulary.coverage import Coverage, UnmappedToken, coverage

__all__ = [
    "UNMAPPED_ROWS",
    "Alignment",
    "Coverage",
    "UnmappedToken",
    "align",
    "align_embedding",
    "coverage",
    "undecodable",
]

__getattr__ = former_names(__name__, {"MISSING_ROWS": "entrgi.vocabulary.UNMAPPED_ROWS"})
