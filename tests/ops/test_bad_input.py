"""Bad input raises a message that names the argument; it never crashes and never passes silently."""

from __future__ import annotations

import math
import re

import pytest
import torch

from support.calls import OPERATORS, WRITTEN, D, N, P, S, V, arguments, call

WITH_LOGITS = OPERATORS[:-1]
WITH_TEMPERATURE = [name for name in WITH_LOGITS if name != "gumbel_perturb"]
WITH_EMBEDDING = OPERATORS[3:-1]
WITH_ROWS = OPERATORS[4:-1]
UPDATES = OPERATORS[5:-1]


def transposed_storage(t: torch.Tensor) -> torch.Tensor:
    return t.T.contiguous().T


def longer(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[-1:]])


def wider(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[:, -1:]], dim=1)


def flat(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1)


def deeper(t: torch.Tensor) -> torch.Tensor:
    return t[None]


def to(dtype: torch.dtype):
    def convert(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype)

    convert.__name__ = f"to_{str(dtype).removeprefix('torch.')}"
    return convert


def value(x):
    def replace(_):
        return x

    replace.__name__ = f"is_{x}"
    return replace


def element(index: int, x: int):
    def replace(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[index] = x
        return t

    replace.__name__ = f"holds_{x}"
    return replace


def ids(x: int):
    """A list of forbidden ids in place of the mask."""

    def replace(t: torch.Tensor) -> torch.Tensor:
        return torch.tensor([3, x, 5], dtype=torch.int32, device=t.device)

    replace.__name__ = f"ids_with_{x}"
    return replace


def cases(names, argument: str, *changes, named: str | None = None):
    """Every operator x every change of one argument; ``named`` is a pattern for what the message must name."""
    pattern = named or rf"\b{argument}\b"
    for name in names:
        for change in changes:
            yield pytest.param(name, argument, change, pattern, id=f"{name}-{argument}-{change.__name__}")


SHAPES_AND_DTYPES = [
    *cases(WITH_LOGITS, "logits", flat, deeper, to(torch.int64), to(torch.bool), to(torch.complex64)),
    *cases(["logit_statistics", "relaxed_embedding"], "logits", transposed_storage),
    *cases(["sample_tokens", "gumbel_perturb", *WITH_ROWS], "logits", transposed_storage),
    *cases(WITH_EMBEDDING, "embedding", flat, deeper, longer, transposed_storage, to(torch.int32)),
    *cases(WITH_EMBEDDING, "embedding", to(torch.float64)),
    *cases(WITH_EMBEDDING, "logits", to(torch.float64), named=r"\b(logits|embedding|logsumexp|soft|weight)\b"),
    *cases(WITH_EMBEDDING, "logsumexp", longer, deeper, to(torch.float64), to(torch.bfloat16), to(torch.int64)),
    *cases(WITH_ROWS, "soft", longer, wider, flat, deeper, to(torch.float64), to(torch.bfloat16)),
    *cases(WITH_ROWS, "row_index", longer, deeper, to(torch.int32), to(torch.float32)),
    *cases(WITH_ROWS, "row_index", value(None), named=r"\b(row_index|output|grad)\b"),  # 7 rows for 5 logits
    *cases(["relaxed_embedding", "relaxed_embedding_"], "hard_tokens", longer, deeper, to(torch.int32)),
    *cases(["relaxed_embedding", "relaxed_embedding_"], "weight", longer, deeper, to(torch.float64)),
    *cases(["relaxed_embedding", "relaxed_embedding_"], "weight", to(torch.bfloat16), to(torch.int64)),
    *cases(["relaxed_embedding", "relaxed_embedding_"], "hard_tokens", value(None), named=r"\b(weight|hard_tokens)\b"),
    *cases(["relaxed_embedding_"], "output", wider, flat, deeper, to(torch.bfloat16), to(torch.float64)),
    *cases(UPDATES, "grad", wider, flat, deeper, to(torch.bfloat16), to(torch.float64), to(torch.int64)),
    *cases(["adam_step_"], "exp_avg", longer, wider, flat, to(torch.float64), to(torch.bfloat16)),
    *cases(["adam_step_"], "exp_avg_sq", longer, wider, flat, to(torch.float64), to(torch.bfloat16)),
    *cases(["adam_step_"], "exp_avg", value(None), named=r"\bexp_avg\b"),
    *cases(["adam_step_"], "exp_avg_sq", value(None), named=r"\bexp_avg_sq\b"),
    *cases(["sample_tokens", "gumbel_perturb", "commit_"], "keys", longer, wider, flat),
    *cases(["sample_tokens", "gumbel_perturb", "commit_"], "keys", to(torch.int32), to(torch.float32)),
    *cases(["sample_tokens"], "forbidden", longer, deeper, to(torch.uint8), to(torch.float32), to(torch.int64)),
    *cases(["sample_tokens"], "error_flag", longer, to(torch.int64), to(torch.float32)),
    *cases(["commit_"], "tokens", flat, deeper, to(torch.int32), to(torch.float32)),
    *cases(["commit_"], "committed", longer, deeper, to(torch.uint8)),
    *cases(["commit_"], "candidates", deeper, to(torch.int32), to(torch.float32)),
    *cases(["commit_"], "candidates", longer, named=r"\b(candidates|committed|confidence|positions)\b"),
    *cases(["commit_"], "confidence", longer, deeper, to(torch.int64)),
    *cases(["commit_"], "positions", longer, deeper, to(torch.int32)),
    *cases(["commit_"], "splits", longer, deeper, to(torch.int32)),
    *cases(["commit_"], "counts", longer, deeper, to(torch.int32), to(torch.float32)),
]

VALUES = [
    *cases(WITH_TEMPERATURE, "temperature", *(value(x) for x in (0.0, -0.7, math.nan, math.inf, -math.inf, 1e-9, 1e9))),
    *cases(["sample_tokens"], "top_p", *(value(x) for x in (-0.1, 1.0001, math.nan, math.inf, -math.inf))),
    *cases(["sample_tokens"], "top_k", *(value(x) for x in (0, -1, -(2**63)))),
    *cases(["gumbel_perturb"], "scale", *(value(x) for x in (-0.1, math.nan, math.inf, -math.inf, 1.1e6))),
    *cases(["adam_step_"], "step", *(value(x) for x in (0, -1))),
    *cases(["commit_"], "alg_temp", *(value(x) for x in (-0.5, math.nan, math.inf))),
    *cases(["commit_"], "keys", value(None)),
]

# Ids and indices: checked on the CPU, made harmless on CUDA.
OUT_OF_RANGE = [
    *cases(
        ["sample_tokens"], "forbidden", ids(V), ids(-1), named=rf"forbidden must hold ids in \[0, {V}\), got .* at 1"
    ),
    *cases(["relaxed_embedding", "relaxed_embedding_"], "hard_tokens", element(1, V), element(1, -2)),
    *cases(["relaxed_embedding", "relaxed_embedding_"], "hard_tokens", element(1, 2**40), element(1, -(2**62))),
    *cases(WITH_ROWS, "row_index", element(1, N + 2), element(1, -2), element(1, 2**40)),
    *cases(["commit_"], "positions", element(1, S), element(1, -1), element(1, 2**40)),
    *cases(["commit_"], "splits", element(0, -1), element(P, N + 1)),
    *cases(["commit_"], "splits", element(1, N + 1), element(1, -1)),
    *cases(["commit_"], "counts", element(0, -1), element(1, -(2**62))),
]


def assert_raises(name: str, keywords: dict, pattern: str) -> None:
    before = {key: keywords[key].clone() for key in WRITTEN.get(name, []) if keywords[key] is not None}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=pattern) as caught:
        call(name, keywords)
    assert not isinstance(caught.value, NotImplementedError), "a missing kernel, not a check"
    for key, expected in before.items():  # nothing half done
        torch.testing.assert_close(keywords[key], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_unchanged_call_passes(device, name):
    call(name, arguments(name, device))


@pytest.mark.parametrize(("name", "argument", "change", "pattern"), [*SHAPES_AND_DTYPES, *VALUES])
def test_shapes_dtypes_values(device, name, argument, change, pattern):
    keywords = arguments(name, device)
    keywords[argument] = change(keywords[argument])
    assert_raises(name, keywords, pattern)


@pytest.mark.parametrize(("name", "argument", "change", "pattern"), OUT_OF_RANGE)
def test_ids_out_of_range(name, argument, change, pattern):
    keywords = arguments(name)
    keywords[argument] = change(keywords[argument])
    assert_raises(name, keywords, pattern)


@pytest.mark.parametrize("argument", ["hard_tokens", "row_index", "positions", "counts"])
def test_ids_out_of_range_are_harmless_on_cuda(device, argument):
    if device == "cpu":
        pytest.skip("the CPU raises: test_ids_out_of_range")
    name = "commit_" if argument in ("positions", "counts") else "relaxed_embedding_"
    for x in (2**40, -(2**40), -2):
        keywords = arguments(name, device)
        keywords[argument] = element(1, x)(keywords[argument])
        call(name, keywords)
        torch.cuda.synchronize()
        if argument == "hard_tokens":
            assert torch.isnan(keywords["output"][keywords["row_index"][1]]).all()


def test_forbidden_ids_out_of_range_are_ignored_on_cuda(device):
    if device == "cpu":
        pytest.skip("the CPU raises: test_ids_out_of_range")
    expected = call(
        "sample_tokens", {**arguments("sample_tokens", device), "forbidden": ids(4)(torch.zeros(1, device=device))}
    )
    for x in (V, -1, 2**31 - 1, -(2**31)):
        keywords = arguments("sample_tokens", device)
        keywords["forbidden"] = torch.tensor([3, x, 4, 5], dtype=torch.int32, device=device)
        for a, b in zip(call("sample_tokens", keywords), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_empty_vocabulary(device, name):
    keywords = arguments(name, device)
    for key in ("logits", "exp_avg", "exp_avg_sq"):
        if key in keywords:
            keywords[key] = keywords[key][:, :0]
    if "embedding" in keywords:
        keywords["embedding"] = keywords["embedding"][:0]
    if "forbidden" in keywords:
        keywords["forbidden"] = keywords["forbidden"][:0]
    assert_raises(name, keywords, r"\blogits\b")


def test_too_large_a_vocabulary(device):
    """V <= 2^23: beyond it the integer masses of the draw could overflow."""
    keywords = arguments("sample_tokens", device)
    keywords.update(logits=torch.zeros(1, 2**23 + 1, device=device), keys=keywords["keys"][:1], forbidden=None)
    assert_raises("sample_tokens", keywords, r"\blogits\b")


@pytest.mark.parametrize("name", OPERATORS)
def test_mixed_devices(device, name):
    """Each tensor in turn on another device: meta beside the CPU, the CPU beside CUDA."""
    other = "meta" if device == "cpu" else "cpu"
    tensors = [key for key, x in arguments(name, device).items() if isinstance(x, torch.Tensor)]
    for key in tensors if len(tensors) > 1 else []:
        keywords = arguments(name, device)
        keywords[key] = keywords[key].to(other)
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            call(name, keywords)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "logit_statistics"])
def test_tensors_with_a_strided_last_dimension_are_read_rightly_or_refused(device, name):
    """Other than logits and embedding the contract is silent: either is fine, a wrong result is not."""
    expected = arguments(name, device)
    results = call(name, expected)
    for key in [k for k, x in expected.items() if isinstance(x, torch.Tensor) and k not in ("logits", "embedding")]:
        keywords = arguments(name, device)
        keywords[key] = torch.stack([keywords[key]] * 2, dim=-1)[..., 0]
        if key == "error_flag":
            continue
        try:
            got = call(name, keywords)
        except RuntimeError as error:
            assert re.search(rf"\b{key}\b", str(error)), error  # noqa: PT017
            continue
        if results is not None:
            pairs = zip(got, results, strict=True) if isinstance(results, tuple) else [(got, results)]
            for a, b in pairs:
                torch.testing.assert_close(a, b, equal_nan=True, msg=key)
        for written in WRITTEN.get(name, []):
            torch.testing.assert_close(keywords[written], expected[written], equal_nan=True, msg=key)


def test_first_step_that_is_not_the_last_needs_moments(device):
    keywords = arguments("adam_step_", device)
    keywords.update(step=1, exp_avg=None, exp_avg_sq=None)
    assert_raises("adam_step_", keywords, r"\bexp_avg\b")
    keywords.update(step=2, last=True)
    assert_raises("adam_step_", keywords, r"\bexp_avg\b")


@pytest.mark.parametrize("name", OPERATORS)
def test_messages_tell_what_came(name):
    """e.g. `temperature must be > 0 and finite, got -0.7`."""
    if name == "commit_":
        keywords, pattern = {**arguments(name), "alg_temp": -0.7}, r"alg_temp must be .*-0\.7"
    elif name == "gumbel_perturb":
        keywords, pattern = {**arguments(name), "scale": -0.7}, r"scale must be .*-0\.7"
    else:
        keywords, pattern = {**arguments(name), "temperature": -0.7}, r"temperature must be > 0.*-0\.7"
    assert_raises(name, keywords, pattern)


def test_not_a_tensor():
    for name in OPERATORS:
        for x in (None, "logits", [[1.0, 2.0]]):
            key = "tokens" if name == "commit_" else "logits"
            with pytest.raises((RuntimeError, TypeError, AttributeError)):
                call(name, {**arguments(name), key: x})


def test_width_of_the_embedding_may_be_anything(device):
    """d = 1 and d = 0 are odd but legal or refused, never a crash."""
    for d in (1, 0):
        keywords = arguments("relaxed_embedding", device, d=d)
        try:
            output, soft = call("relaxed_embedding", keywords)
        except RuntimeError as error:
            assert d == 0, error  # noqa: PT017
            assert "embedding" in str(error)  # noqa: PT017
        else:
            assert output.shape == soft.shape == (N, d)
    assert D > 1
