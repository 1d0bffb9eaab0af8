"""Which combinations of a test's parameters are collected, and which of them by default.

``@pytest.mark.grid(strength=2, only=possible)``: combinations for which ``possible(parameters)`` is false mean nothing
and are not collected. Of the others, so many stay that every combination of ``strength`` parameters is among them; the
rest of the product is marked slow, which ``make test`` leaves out and ``.ci/run`` runs. Most faults of code with n
arguments show with two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def few(values: Iterable, *kept: object) -> list:
    """The values as parameters of a test, of which those that are not kept are slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def choose(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The items to collect, in their order; those beyond the cover of a grid are marked.

    Of a test that needs a GPU, one item stays where there is none: to say so.
    """
    kept = []
    for _, group in itertools.groupby(items, key=lambda item: (item.parent, getattr(item, "originalname", item.name))):
        group = list(group)
        if group[0].get_closest_marker("gpu") and not _has_gpu():
            group = group[:1]
        marks = list(group[0].iter_markers("grid"))
        conditions = [mark.kwargs["only"] for mark in marks if "only" in mark.kwargs]
        group = [item for item in group if all(condition(_parameters(item)) for condition in conditions)]
        strength = next((mark.kwargs["strength"] for mark in marks if "strength" in mark.kwargs), None)
        if strength:
            values = [_values(item) for item in group]
            for number in set(range(len(group))) - cover(values, strength):
                group[number].add_marker(pytest.mark.slow)
        kept += group
    return kept


def _has_gpu() -> bool:
    import torch  # not in processes that test nothing of it

    return torch.cuda.is_available()


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _values(item: pytest.Item) -> tuple:
    """Which value of each parameter: every item of a product holds the same objects."""
    return tuple((name, id(value)) for name, value in _parameters(item).items())


def cover(rows: list[tuple], strength: int) -> set[int]:
    """Numbers of few rows that hold every combination of ``strength`` entries, greedily."""
    open_ = [set(itertools.combinations(row, min(strength, len(row)))) for row in rows]
    wanted, chosen = set().union(*open_), set()
    while wanted:
        best = max(range(len(rows)), key=lambda number: len(open_[number] & wanted))
        chosen.add(best)
        wanted -= open_[best]
    return chosen
