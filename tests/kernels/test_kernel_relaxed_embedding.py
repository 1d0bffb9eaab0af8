"""The relaxed embedding's kernels against ``entrgi_ext.reference``: every product, tile and alignment.

Each test runs on the kernel that the plan chooses and, where that is Hopper's, on the one for sm_80 as well; with
fp32 embeddings on both that take them.
"""

import math

import pytest
import torch

from support.cases import DTYPES, placed, relative_l2
from support.relaxed_embeddings import TAU, aligned, ask, check, count, inputs
from support.variants import every_kernel, is_matmul

# Rows of the logits that select the tiles of 16, 64 and 128 rows.
ROWS = [5, 40, 130]
kernel, possible = every_kernel("relaxed_embedding")
pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2, only=possible)]


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_dtypes_and_tiles(kernels, reference, logits_dtype, embedding_dtype, n):
    z, lse, embedding, hard, weight = inputs(reference, n, 1001, 200, logits_dtype, embedding_dtype)
    hard[0] = -1
    hard[1] = 1001
    output, soft = kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert torch.isnan(output[:2]).all()
    assert torch.isfinite(soft).all()
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (1, 64), (31, 3), (32, 129), (33, 257), (515, 7)])
@pytest.mark.parametrize("n", [1, 17, 65])
def test_tails(kernels, reference, embedding_dtype, vocab, dim, n):
    z, lse, embedding, hard, weight = inputs(reference, n, vocab, dim, embedding_dtype, embedding_dtype)
    output, soft = kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("granule", [16, 8, 4, 2])
def test_alignments(kernels, reference, logits_dtype, embedding_dtype, granule):
    """Rows that can be copied 16, 8, 4 or 2 bytes at a time; what lies between them is NaN."""
    z, lse, embedding, hard, weight = inputs(reference, 6, 328, 72, logits_dtype, embedding_dtype)

    def shifted(tensor):
        step = max(granule // tensor.element_size(), 1)
        return placed(tensor, offset=step, pad=(step - tensor.shape[1]) % step + step)

    output, soft = placed(torch.zeros(6, 72, dtype=embedding_dtype), 3, 5), placed(torch.zeros(6, 72), 1, 2)
    splits = 1 if is_matmul(kernels) else 2
    kernels.relaxed_embedding(
        shifted(z), lse, shifted(embedding), hard, weight, TAU, output=output, soft=soft, splits=splits
    )
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("embedding_dtype", DTYPES)
def test_optional_arguments(kernels, reference, embedding_dtype):
    z, lse, embedding, hard, weight = inputs(reference, 9, 300, 40, torch.bfloat16, embedding_dtype)
    for h, w in ((None, None), (hard, None), (hard, weight), (hard, torch.zeros(9)), (hard, torch.ones(9))):
        output, soft = kernels.relaxed_embedding(z, lse, embedding, h, w, TAU)
        check(reference, output, soft, z, lse, embedding, h, w)
        if h is None:
            assert torch.equal(output, soft.to(embedding_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_scattered_rows_and_padding(kernels, reference, dtype, n):
    """Rows go where ``rows`` says; a padding row (-1) is not written, and what it holds does not count."""
    z, lse, embedding, hard, weight = inputs(reference, n, 333, 48, dtype, dtype)
    padding = torch.arange(n) % 3 == 1
    rows = torch.randperm(2 * n)[:n]
    rows[padding] = -1
    spoiled = aligned(z)
    spoiled[padding] = math.nan
    output, soft = torch.full((2 * n, 48), -7.0, dtype=dtype), torch.full((n, 48), -7.0)
    kernels.relaxed_embedding(
        spoiled, lse.masked_fill(padding, math.nan), embedding, hard, weight, TAU, rows=rows, output=output, soft=soft
    )
    here = ~padding
    check(reference, output[rows[here]], soft[here], z[here], lse[here], embedding, hard[here], weight[here])
    untouched = torch.ones(2 * n, dtype=torch.bool)
    untouched[rows[here]] = False
    assert (output[untouched] == -7).all()
    assert (soft[padding] == -7).all()
    # A row outside the buffer is padding too: never a write out of bounds.
    rows[here] = 2 * n
    before = output.clone()
    kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
    assert torch.equal(output, before)


@pytest.mark.parametrize("embedding_dtype", DTYPES)
def test_infinities(kernels, reference, embedding_dtype):
    """-inf has probability 0; a row whose logsumexp is NaN is NaN, and no other row is."""
    z, lse, embedding, hard, weight = inputs(reference, 20, 500, 33, torch.float32, embedding_dtype)
    z[:, ::2] = -math.inf
    z[3] = -1e4  # e^(0 - lse) of what lies past the end of the vocabulary would be inf
    z[7] = -math.inf
    lse = reference.logit_statistics(z, TAU).logsumexp
    output, soft = kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert torch.isnan(soft[7]).all()
    good = torch.arange(20) != 7
    check(reference, output[good], soft[good], z[good], lse[good], embedding, hard[good], weight[good])


def test_flat_rows_keep_their_precision_in_fp16(kernels, reference):
    """q = 1 / V is subnormal in fp16 from V = 16,384 on: operands are scaled before they are rounded."""
    z, lse, embedding, _, _ = inputs(reference, 3, 40_001, 8, torch.float16, torch.float16, scale=0.1)
    _, soft = kernels.relaxed_embedding(z, lse, embedding, None, None, TAU)
    _, truth = reference.relaxed_embedding(z.double(), lse.double(), embedding.double(), None, None, TAU)
    assert relative_l2(soft, truth) <= 5e-4


@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-3, 10.0])
def test_temperatures(kernels, reference, embedding_dtype, tau):
    z, _, embedding, _, _ = inputs(reference, 6, 700, 50, torch.bfloat16, embedding_dtype)
    lse = reference.logit_statistics(z, tau).logsumexp
    _, soft = kernels.relaxed_embedding(z, lse, embedding, None, None, tau)
    _, truth = reference.relaxed_embedding(z.double(), lse.double(), embedding.double(), None, None, tau)
    _, torchs = reference.relaxed_embedding(z, lse, embedding, None, None, tau)
    assert relative_l2(soft, truth) <= 2 * relative_l2(torchs, truth) + 1e-6


@pytest.mark.parametrize("embedding_dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 70])
def test_splits_and_determinism(kernels, reference, embedding_dtype, n):
    z, lse, embedding, hard, weight = inputs(reference, n, 999, 65, torch.bfloat16, embedding_dtype)
    for splits in (1,) if is_matmul(kernels) else (1, 2, 5, 1000):
        first = kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU, splits=splits)
        again = kernels.relaxed_embedding(z, lse, embedding, hard, weight, TAU, splits=splits)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        check(reference, *first, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels, dtype):
    z, embedding = torch.empty(0, 9, dtype=dtype), torch.ones(9, 5, dtype=dtype)
    output, soft = kernels.relaxed_embedding(z, torch.empty(0), embedding, None, None, 1.0)
    assert output.shape == soft.shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_32_bit_offsets(kernels, reference, dtype):
    """The last row of matrices whose rows are 2^33 elements apart; a tile of rows that are not there is padding."""
    absent = 64
    z, lse, embedding, hard, weight = inputs(reference, absent + 1, 200, 24, dtype, dtype)
    rows = torch.full((absent + 1,), -1)
    rows[absent] = absent
    output, soft = torch.zeros(1, 24, dtype=dtype), torch.zeros(1, 24)
    far = dict.fromkeys(("logits", "output", "soft"), 2**33)
    tile = {} if is_matmul(kernels) else {"block_m": 64, "cluster_m": 1}
    with kernels.overridden(**kernels.overrides, **tile), kernels.first_row_absent(far, absent):
        kernels.relaxed_embedding(z[absent:], lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
    here = slice(absent, None)
    check(reference, output, soft, z[here], lse[here], embedding, hard[here], weight[here])


# ---- what the kernels ask of the memory system ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "vocab", "dim", "logits_dtype", "dtype", "splits"),
    [
        (8, 2048, 512, torch.bfloat16, torch.bfloat16, 0),
        (60, 1000, 200, torch.float32, torch.float16, 2),
        (300, 1000, 264, torch.bfloat16, torch.bfloat16, 2),
        (200, 500, 512, torch.float32, torch.bfloat16, 2),
        (70, 700, 72, torch.float32, torch.float32, 3),
    ],
)
def test_requests_are_what_the_simulator_counts(
    kernels, reference, tmp_path, request, n, vocab, dim, logits_dtype, dtype, splits
):
    z, lse, embedding, hard, weight = inputs(reference, n, vocab, dim, logits_dtype, dtype)
    splits = 1 if is_matmul(kernels) else splits
    counted = count(kernels, tmp_path, z, lse, embedding, hard, weight, TAU, splits=splits)

    arch = 80 if request.node.callspec.params["kernels"] == "compute_80" else 90
    shape = {
        "n": n,
        "vocab": vocab,
        "dim": dim,
        "logits_dtype": str(logits_dtype)[6:],
        "embedding_dtype": str(dtype)[6:],
    }
    options = shape | kernels.overrides | {"splits": splits, "arch": arch}
    (requests,) = ask(kernels, "requests", options)
    if is_matmul(kernels):  # the product's own, which is not in the simulator
        counted["global_load_bytes"] += (n + dim) * vocab * 4
        counted["global_store_bytes"] += n * dim * 4

    assert requests["load_bytes"] == pytest.approx(counted["global_load_bytes"] + counted["cp_async_bytes"], rel=0.02)
    assert requests["bulk_bytes"] == pytest.approx(counted["tma_load_bytes"], rel=0.02)
    assert requests["store_bytes"] == pytest.approx(counted["global_store_bytes"], rel=0.02)
    if dtype != torch.float32:  # the ordinary cores compute q as well
        assert requests["flops"] == pytest.approx(counted["mma_flop"] + counted["wgmma_flop"], rel=0.02)
