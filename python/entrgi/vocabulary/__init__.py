"""Tokens of one model as seen by another: which ids a denoiser may draw, and what the reward reads there."""

from entrgi.vocabulary.alignment import MISSING_ROWS, Alignment, align, align_embedding, undecodable
from entrgi.vocabulary.coverage import Coverage, UnmappedToken, coverage

__all__ = [
    "MISSING_ROWS",
    "Alignment",
    "Coverage",
    "UnmappedToken",
    "align",
    "align_embedding",
    "coverage",
    "undecodable",
]
