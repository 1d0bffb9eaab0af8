"""Rows of logits and moments start at 16-byte boundaries wherever the sampler makes them, whatever the vocabulary."""

import pytest
import torch

import entrgi.graphs
import entrgi.guidance
import entrgi.sampler
from entrgi import generate
from entrgi.rows import empty_rows, with_aligned_rows
from entrgi_ext import ops, plans
from sampler.test_graphs import ReplayedByCalling
from support import tiny

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 5, "steps": 3, "seed": 1}
LOGITS_FIRST = ("logit_statistics", "sample_tokens", "gumbel_perturb", "adam_step_", "sgd_step_")


def aligned(matrix):
    """What csrc/kernels/plan.h asks of rows."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def contiguous_rows(count, width, dtype, device):
    return torch.empty(count, width, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 61, 30_522])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_empty_rows(count, width, dtype):
    rows = empty_rows(count, width, dtype, torch.device("cpu"))
    assert rows.shape == (count, width)
    assert rows.dtype == dtype
    assert aligned(rows)
    assert rows.stride(0) * dtype.itemsize < width * dtype.itemsize + 16


def test_what_is_aligned_is_not_copied():
    whole = torch.randn(4, 64)
    for matrix in (whole, whole[1:], whole[:, :61], whole[:, 4:]):
        assert with_aligned_rows(matrix, torch.float32) is matrix
    for matrix in (whole[:, 1:], whole[:, :61].contiguous(), whole[:, ::2]):
        copy = with_aligned_rows(matrix, torch.float32)
        assert aligned(copy)
        assert torch.equal(copy, matrix)
        assert copy.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert with_aligned_rows(whole, torch.bfloat16).dtype == torch.bfloat16


@pytest.fixture
def seen(monkeypatch):
    """The [N, V] matrices that reach operators, by operator."""
    matrices = {}

    def watch(name, operator):
        def watched(*args, **options):
            first = 0 if name in LOGITS_FIRST else 1 if name == "logit_gradient" else 2
            vocabulary = args[first].shape[1]
            given = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == vocabulary]
            matrices.setdefault(name, []).extend(given)
            return operator(*args, **options)

        return watched

    for name in (*LOGITS_FIRST, "logit_gradient", "relaxed_embedding_"):
        monkeypatch.setattr(ops, name, watch(name, getattr(ops, name)))
    return matrices


@pytest.mark.parametrize("width", [61, 30_522])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"logits_dtype": torch.bfloat16}),
        (torch.bfloat16, {"guidance": "gumbel"}),
        (torch.bfloat16, {"optimizer": "sgd", "cuda_graphs": True}),
    ],
    ids=str,
)
def test_every_matrix_of_a_generation(seen, monkeypatch, width, dtype, options):
    monkeypatch.setattr(tiny, "LOGITS_WIDTH", width)
    options = dict(options)
    if options.pop("cuda_graphs", False):
        monkeypatch.setattr(entrgi.sampler, "prepare", with_graphs(entrgi.sampler.prepare))
    models = tiny.denoiser(dtype), tiny.bert_reward(dtype)
    output = generate("the movie", *models, **OPTIONS, **options)
    update = {"sgd": "sgd_step_"}.get(options.get("optimizer"), "adam_step_")
    expected = {"logit_gradient", "gumbel_perturb"} if options.get("guidance") == "gumbel" else {update}
    assert expected | {"sample_tokens", "relaxed_embedding_"} <= set(seen)
    for name, matrices in seen.items():
        assert all(aligned(matrix) for matrix in matrices), name
    if "adam_step_" in seen and seen["adam_step_"][0].dtype == torch.bfloat16:
        assert any(matrix.dtype == torch.float32 for matrix in seen["adam_step_"]), "moments were seen, too"

    # the same texts where rows follow each other without room
    monkeypatch.setattr(entrgi.sampler, "with_aligned_rows", lambda matrix, dtype: matrix.to(dtype))
    monkeypatch.setattr(entrgi.guidance, "empty_rows", contiguous_rows)
    seen.clear()
    plain = generate("the movie", *models, **OPTIONS, **options)
    assert not all(aligned(matrix) for matrix in seen["sample_tokens"]), "this vocabulary needs the room"
    assert torch.equal(output.sequences, plain.sequences)


def with_graphs(prepare):
    """Generations replay their guidance, by calling it again."""

    def graphed(*args, **options):
        task = prepare(*args, **options)
        object.__setattr__(task, "graphs", ReplayedByCalling(task.denoiser.device))
        return task

    return graphed


@pytest.mark.parametrize("width", [30_522, 151_937])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["sample_tokens", "relaxed_embedding", "adam_step_"])
def test_hopper_kernels_are_planned_for_them(width, dtype, op):
    rows = empty_rows(2, width, dtype, torch.device("cpu"))
    shape = (op, 64, width, 1024, dtype, "bfloat16")
    assert plans.launch_plan(*shape, arch=90, logits_aligned=aligned(rows)).kernel.endswith("_sm90")
    dense = contiguous_rows(2, width, dtype, torch.device("cpu"))
    if op != "sample_tokens":  # the vocabulary pass takes any rows
        assert not plans.launch_plan(*shape, arch=90, logits_aligned=aligned(dense)).kernel.endswith("_sm90")
