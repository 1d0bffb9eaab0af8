"""Fakes refuse what the operators refuse, in the same words: what torch.compile and FakeTensor let through would fail
only when it runs, or on the device."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ops.test_bad_input import SHAPES_AND_DTYPES, VALUES
from support.calls import OPERATORS, arguments, names_of, operator_schemas, schema_arguments

# What data or memory alone can tell.
BEYOND_FAKES = r" at \d+$|\brow \d+\b|must not repeat|share memory|for trajectory"


def message_of(name: str, given: tuple) -> str | None:
    try:
        getattr(torch.ops.entrgi, name)(*given)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def fake_message_of(name: str, given: tuple) -> str | None:
    with FakeTensorMode() as mode:
        return message_of(name, tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))


def assert_alike(name: str, keywords: dict) -> str | None:
    given = schema_arguments(name, keywords)
    fake, real = fake_message_of(name, given), message_of(name, given)
    if fake is None and real is not None:
        assume(not re.search(BEYOND_FAKES, real))
    assert fake == real
    return real


def test_every_operator_is_covered():
    assert set(operator_schemas()) == {*OPERATORS, "logit_statistics_backward"}


@pytest.mark.parametrize(("name", "argument", "change", "pattern"), [*SHAPES_AND_DTYPES, *VALUES])
def test_each_refusal(name, argument, change, pattern):
    keywords = arguments(name)
    keywords[argument] = change(keywords[argument])
    assert re.search(pattern, assert_alike(name, keywords))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_valid_calls_pass(name, dtype):
    assert assert_alike(name, arguments(name, dtype=dtype)) is None


CHANGES = {
    "nothing": lambda t: t,
    "double": lambda t: t.double(),
    "float": lambda t: t.float(),
    "half": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "int64": lambda t: t.long(),
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "narrower": lambda t: t[..., :-1],
    "one column": lambda t: t[..., :1],
    "no column": lambda t: t[..., :0],
    "every other": lambda t: torch.cat([t, t], dim=-1)[..., ::2],
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "overlapping": lambda t: t[:1].expand(t.shape),
    "deeper": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "complex": lambda t: t.to(torch.complex64),
}
NUMBERS = (-1.0, 0.0, 0.3, 1.0, 1e-7, 1e7, float("nan"), float("inf"))


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
def test_several_changes_at_once(name, data):
    """Which of several faults is named, and what is no fault: both sides agree."""
    keywords = arguments(name)
    names = [key for key in names_of(name) if key in keywords]
    for key in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        value = keywords[key]
        if isinstance(value, torch.Tensor):
            keywords[key] = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](value)
        elif isinstance(value, float):
            keywords[key] = data.draw(st.sampled_from(NUMBERS))
        elif key in ("top_k", "eos_token_id"):
            keywords[key] = data.draw(st.sampled_from([None, -1, 0, 1, 1000]))
    assert_alike(name, keywords)


@pytest.mark.parametrize("place", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_elsewhere_are_named(name, place):
    """FakeTensors of a device that this machine may lack, one argument on another."""
    other = "cpu" if place == "cuda" else "cuda"
    keywords = arguments(name)
    tensors = {key: x for key, x in keywords.items() if isinstance(x, torch.Tensor)}
    like = next(key for key in names_of(name) if key in ("logits", "tokens"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            where: {
                key: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=where) for key, x in tensors.items()
            }
            for where in (place, other)
        }
        for odd in tensors.keys() - {like}:
            mixed = schema_arguments(name, {**keywords, **fakes[place], odd: fakes[other][odd]})
            assert re.search(rf"\b{odd} must be on {place}", message_of(name, mixed) or ""), odd
