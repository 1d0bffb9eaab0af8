"""Tokens of one model as seen by another: which ids a denoiser may draw, and what the reward reads there."""

from entrgi.deprecated import warn_renamed
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


def __getattr__(name: str) -> object:
    if name == "MISSING_ROWS":
        warn_renamed("entrgi.vocabulary.MISSING_ROWS", "UNMAPPED_ROWS")
        return UNMAPPED_ROWS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
