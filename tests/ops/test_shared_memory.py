"""What an operator writes may share memory with no other argument: it would read what it has just written, and checks
of the data that came before would no longer hold. Every pair, from the schemas."""

from __future__ import annotations

import pytest
import torch

from support.calls import arguments, call, operator_schemas

ALIGNMENT = 16  # of every dtype


def pairs():
    """(operator, what is written, any other tensor)"""
    for name, schema in operator_schemas().items():
        tensors = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
        written = [a.name for a in tensors if a.alias_info is not None and a.alias_info.is_write]
        for one in written:
            for other in tensors:
                if other.name != one and (other.name not in written or written.index(other.name) > written.index(one)):
                    yield name, one, other.name


PAIRS = list(pairs())


def extent(t: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def place(t: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of the tensor at an offset in bytes of a buffer."""
    view = torch.empty(0, dtype=t.dtype, device=t.device)
    view.set_(memory.untyped_storage(), offset // t.element_size(), t.shape, t.stride())
    return view.copy_(t)


def together(name: str, device: str, first: str, second: str, offset) -> dict:
    """A valid call in which ``second`` begins ``offset(bytes of first)`` bytes after ``first`` in one buffer."""
    keywords = arguments(name, device)
    a, b = keywords[first], keywords[second]
    memory = torch.zeros(2 * (extent(a) + extent(b) + ALIGNMENT), dtype=torch.uint8, device=device)
    at = offset(extent(a))
    keywords[first], keywords[second] = place(a, memory, 0), place(b, memory, at)
    if at < extent(a):
        keywords[first].copy_(a)  # both cannot hold; what is written is valid whatever it holds
    return keywords


def test_there_are_pairs_of_every_operator_that_writes():
    assert {name for name, *_ in PAIRS} == {"sample_tokens", "relaxed_embedding_", "adam_step_", "sgd_step_", "commit_"}
    assert len(PAIRS) > 40


@pytest.mark.parametrize("order", ["before", "behind", "same"])
@pytest.mark.parametrize(("name", "written", "other"), PAIRS)
def test_shared_memory_is_refused(device, name, written, other, order):
    def last_bytes(size: int) -> int:
        return (size - 1) // ALIGNMENT * ALIGNMENT

    first, second = (written, other) if order != "behind" else (other, written)
    keywords = together(name, device, first, second, last_bytes if order != "same" else lambda size: 0)
    before = keywords[written].clone()
    with pytest.raises(
        ValueError, match=rf"^{written} is written in place and must not share memory with {other}, got"
    ):
        call(name, keywords)
    torch.testing.assert_close(keywords[written], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "written", "other"), PAIRS)
def test_neighbours_are_fine(device, name, written, other):
    """One directly behind the other, at the next boundary of 16 bytes."""
    expected = arguments(name, device)
    keywords = together(name, device, written, other, lambda size: (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)
    call(name, keywords)
    call(name, expected)
    torch.testing.assert_close(keywords[written], expected[written], equal_nan=True)


def interleaved(left: torch.Tensor, right: torch.Tensor, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of one dtype as columns of one buffer, ``gap`` columns apart."""
    width = left.shape[1] + right.shape[1] + max(gap, 0)
    buffer = torch.zeros(max(left.shape[0], right.shape[0]), width, dtype=left.dtype, device=left.device)
    first = left.shape[1] + gap
    views = buffer[: left.shape[0], : left.shape[1]], buffer[: right.shape[0], first : first + right.shape[1]]
    return views[0].copy_(left), views[1].copy_(right)


MATRICES = [("relaxed_embedding_", "output", "embedding"), ("relaxed_embedding_", "soft", "output")]
MATRICES += [
    ("adam_step_", "logits", "exp_avg"),
    ("adam_step_", "exp_avg", "exp_avg_sq"),
    ("sgd_step_", "logits", "grad"),
]


@pytest.mark.parametrize(("name", "written", "other"), MATRICES)
def test_columns_of_one_buffer_are_told_apart(device, name, written, other):
    """Rows between each other's are fine; a single common column is not."""
    expected, keywords = arguments(name, device), arguments(name, device)
    keywords[written], keywords[other] = interleaved(keywords[written], keywords[other], 0)
    call(name, keywords)
    call(name, expected)
    torch.testing.assert_close(keywords[written], expected[written])

    keywords = arguments(name, device)
    keywords[written], keywords[other] = interleaved(keywords[written], keywords[other], -1)
    with pytest.raises(ValueError, match="must not share memory"):
        call(name, keywords)


WRITTEN_ROWS = [("relaxed_embedding_", "output"), ("relaxed_embedding_", "soft"), ("sgd_step_", "logits")]
WRITTEN_ROWS += [("adam_step_", key) for key in ("logits", "exp_avg", "exp_avg_sq")]
WRITTEN_ROWS += [("commit_", "tokens"), ("commit_", "committed")]


@pytest.mark.parametrize(("name", "written"), WRITTEN_ROWS)
def test_elements_that_are_one_are_not_written(device, name, written):
    keywords = arguments(name, device)
    keywords[written] = keywords[written][:1].expand(keywords[written].shape)
    with pytest.raises(RuntimeError, match=rf"^{written} (is written in place and its rows|must be contiguous)"):
        call(name, keywords)


def test_what_is_only_read_may_be_one(device):
    keywords = arguments("commit_", device)
    keywords["positions"] = keywords["candidates"]
    call("commit_", keywords)
    keywords = arguments("sgd_step_", device)
    keywords["grad"] = keywords["embedding"][:7]
    call("sgd_step_", keywords)
