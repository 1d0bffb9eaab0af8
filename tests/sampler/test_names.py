"""Public names: what is documented exists, and what has been renamed still works and says so."""

import ast
import importlib
from pathlib import Path

import pytest

import entrgi

FORMER = {
    "entrgi.GuidanceTrace": "entrgi.guidance.GuidanceOutput",
    "entrgi.guidance.GuidanceTrace": "entrgi.guidance.GuidanceOutput",
    "entrgi.matmul.fast_products": "entrgi.matmul.onednn_matmul",
}


@pytest.mark.parametrize(("former", "current"), FORMER.items())
def test_former_names_are_the_new_ones_and_warn_where_they_are_asked_for(former, current):
    def named(path):
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    with pytest.warns(DeprecationWarning, match=f"{former} is deprecated .*, use {current}") as caught:
        found = named(former)
    assert caught[0].filename == __file__
    assert found is named(current)


def test_the_loader_is_still_found_where_it_was():
    with pytest.warns(DeprecationWarning, match="entrgi.checkpoints is deprecated .*, use entrgi.models.checkpoints"):
        found = importlib.import_module("entrgi.checkpoints").load_pretrained
    assert found is importlib.import_module("entrgi.models.checkpoints").load_pretrained


def test_names_are_written_once():
    """In the stub that type checkers read; each exists, and none is taken from a package that it would hide."""
    stub = Path(entrgi.__file__).with_name("__init__.pyi")
    names = [alias.name for node in ast.parse(stub.read_text()).body if hasattr(node, "names") for alias in node.names]
    assert sorted(names) == entrgi.__all__ == sorted(set(names))
    for name in names:
        assert getattr(entrgi, name).__name__ == name
    assert set(entrgi.__all__) <= set(dir(entrgi))


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match="module 'entrgi' has no attribute 'generat'"):
        entrgi.generat  # noqa: B018
