"""``row_index`` was called ``rows``: the former name works for one release, with a warning."""

from __future__ import annotations

import pytest
import torch

from support.calls import OPERATORS, WRITTEN, arguments, call
from support.helpers import assert_same

WITH_ROW_INDEX = [name for name in OPERATORS if "row_index" in arguments(name)]


def results(name: str, keywords: dict) -> list[torch.Tensor]:
    result = call(name, keywords)
    return [*([] if result is None else [result]), *(keywords[key] for key in WRITTEN.get(name, []))]


@pytest.mark.parametrize("name", WITH_ROW_INDEX)
def test_the_former_name_of_row_index(device, name):
    former = arguments(name, device)
    former["rows"] = former.pop("row_index")
    with pytest.warns(
        DeprecationWarning, match="rows is deprecated and will be removed in the next release, use row_index"
    ) as caught:
        got = results(name, former)
    assert caught[0].filename.endswith("calls.py"), "the caller is named"
    for a, b in zip(got, results(name, arguments(name, device)), strict=True):
        assert_same(a, b, name)


@pytest.mark.parametrize("name", WITH_ROW_INDEX)
def test_both_names_at_once(name):
    keywords = arguments(name)
    with pytest.raises(TypeError, match="rows is the former name of row_index: expected one of them, got both"):
        call(name, {**keywords, "rows": keywords["row_index"]})


def test_four_operators_have_rows():
    assert WITH_ROW_INDEX == ["relaxed_embedding_", "logit_gradient", "adam_step_", "sgd_step_"]
