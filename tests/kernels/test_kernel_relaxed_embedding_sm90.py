"""What only Hopper's kernel of the relaxed embedding has: wide tiles, clusters, TMA and its limits."""

import math

import pytest
import torch
from cases import DTYPES, placed
from test_kernel_relaxed_embedding import AMPERE, TAU, check, count, inputs

pytestmark = pytest.mark.simulator
HOPPER = "relaxed_embedding_sm90"


def aligned(matrix):
    """The same with rows on 16-byte boundaries, NaN between them."""
    step = 16 // matrix.element_size()
    return placed(matrix, 0, -matrix.shape[1] % step)


@pytest.mark.parametrize("dim", [8, 64, 65, 256, 264, 520])
@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 200, 257])
def test_tiles(hopper, reference, n, dim):
    """Whatever tile and cluster the plan chooses; rows, columns and ids that do not fill the last of them."""
    logits_dtype = DTYPES[(n + dim) % 3]
    embedding_dtype = DTYPES[(n + dim // 8) % 2]
    z, lse, embedding, hard, weight = inputs(reference, n, 321, dim, logits_dtype, embedding_dtype)
    output, soft = hopper.relaxed_embedding(z, lse, aligned(embedding), hard, weight, TAU)
    assert hopper.plan["kernel"] == HOPPER
    assert hopper.plan["tile"] in ([(64, 256, 64)] if n <= 64 else [(128, 256, 64), (192, 192, 64)])
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES[:2])
@pytest.mark.parametrize(("block_m", "columns"), [(64, 256), (128, 256), (192, 192)])
def test_every_tile(hopper, reference, logits_dtype, embedding_dtype, block_m, columns):
    z, lse, embedding, hard, weight = inputs(reference, 193, 321, 264, logits_dtype, embedding_dtype)
    with hopper.overridden(block_m=block_m):
        output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["tile"] == (block_m, columns, 64)
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES[:2])
@pytest.mark.parametrize("vocab", [1, 15, 16, 63, 64, 65, 447])
def test_tails_of_the_vocabulary(hopper, reference, logits_dtype, embedding_dtype, vocab):
    """What lies past the end of a row is NaN, of the embedding infinite; e^(0 - lse) would be infinite too."""
    z, _, embedding, hard, weight = inputs(reference, 70, vocab, 40, logits_dtype, embedding_dtype)
    z[2:] -= 200
    lse = reference.logit_statistics(z, TAU).logsumexp
    rows = torch.full((vocab + 3, 40), math.inf, dtype=embedding_dtype)
    rows[:vocab] = embedding
    output, soft = hopper.relaxed_embedding(aligned(z), lse, rows[:vocab], hard, weight, TAU, splits=2)
    assert hopper.plan["kernel"] == HOPPER
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize(("n", "block_m"), [(20, 64), (129, 64), (300, 128), (640, 128), (193, 192), (400, 192)])
def test_clusters_agree(hopper, reference, n, block_m):
    """One, two or four CTAs that share the embedding, row tiles left over, columns that do not fill a cluster.

    Eight steps through two stages: each is refilled when all that read it have left it.
    """
    z, lse, embedding, hard, weight = inputs(reference, n, 450, 264, torch.bfloat16, torch.bfloat16)
    results = []
    for cluster in (1, 2, 4):
        with hopper.overridden(block_m=block_m, cluster_m=cluster, splits=1, stages=2):
            results.append(hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU))
        assert hopper.plan["cluster"] == (cluster, 1)
        assert hopper.plan["grid"] % cluster == 0
        assert torch.equal(results[-1][0], results[0][0])
        assert torch.equal(results[-1][1], results[0][1])
    check(reference, *results[0], z, lse, embedding, hard, weight)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("gone", [slice(0, 128), slice(0, 256), slice(128, 300), slice(0, 299), slice(0, 300)])
def test_tiles_of_padding(hopper, reference, cluster, gone):
    """A CTA without rows still feeds those it shares with; where none of them has rows, they end at once."""
    z, lse, embedding, hard, weight = inputs(reference, 300, 200, 72, torch.bfloat16, torch.bfloat16)
    rows = torch.arange(300)
    rows[gone] = -1
    here = rows >= 0
    z[~here], lse[~here] = math.nan, math.nan
    output, soft = torch.full((300, 72), -7.0, dtype=torch.bfloat16), torch.full((300, 72), -7.0)
    with hopper.overridden(block_m=128, cluster_m=cluster):
        hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
    if here.any():
        check(reference, output[here], soft[here], z[here], lse[here], embedding, hard[here], weight[here])
    assert (output[~here] == -7).all()
    assert (soft[~here] == -7).all()


def test_tiles_of_padding_cost_nothing(hopper, reference, tmp_path):
    z, lse, embedding, hard, weight = inputs(reference, 300, 200, 72, torch.bfloat16, torch.bfloat16)
    rows = torch.arange(300)
    rows[:256] = -1  # the tiles of the one cluster; the third tile stands alone
    output, soft = torch.zeros(300, 72, dtype=torch.bfloat16), torch.zeros(300, 72)
    with hopper.overridden(block_m=128, cluster_m=2, splits=1):
        counted = count(hopper, tmp_path, z, lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
    assert counted["wgmma_flop"] == 2 * 128 * 256 * 256
    assert counted["tma_load_bytes"] == 256 * 256 * 2


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("granule", [16, 8, 4, 2])
def test_takes_logits_of_any_alignment(hopper, reference, logits_dtype, granule):
    z, lse, embedding, hard, weight = inputs(reference, 70, 328, 72, logits_dtype, torch.bfloat16)
    step = max(granule // z.element_size(), 1)
    shifted = placed(z, offset=step, pad=(step - 328) % step + step)
    output, soft = hopper.relaxed_embedding(shifted, lse, embedding, hard, weight, TAU)
    assert hopper.plan["kernel"] == HOPPER
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("granule", [16, 8, 4, 2])
@pytest.mark.parametrize("block_m", [64, 128, 192])
@pytest.mark.parametrize("vocab", [256, 330])
def test_whole_steps_of_any_alignment(hopper, reference, logits_dtype, granule, block_m, vocab):
    """Each way to copy logits in each tile, through refilled stages, with rows of padding between the others."""
    z, lse, embedding, hard, weight = inputs(reference, 197, vocab, 72, logits_dtype, torch.bfloat16)
    rows = torch.arange(197)
    rows[torch.randperm(197, generator=torch.Generator().manual_seed(1))[:60]] = -1
    here = rows >= 0
    z[~here], lse[~here] = math.nan, math.nan
    step = max(granule // z.element_size(), 1)
    shifted = placed(z, offset=step, pad=(step - vocab) % (2 * step))  # rows an odd number of granules apart
    output, soft = torch.zeros(197, 72, dtype=torch.bfloat16), torch.zeros(197, 72)
    with hopper.overridden(block_m=block_m, splits=1, stages=2):
        hopper.relaxed_embedding(shifted, lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
    check(reference, output[here], soft[here], z[here], lse[here], embedding, hard[here], weight[here])


@pytest.mark.parametrize("embedding_dtype", DTYPES[:2])
@pytest.mark.parametrize("n", [4, 70])
def test_splits_and_stages(hopper, reference, embedding_dtype, n):
    z, lse, embedding, hard, weight = inputs(reference, n, 999, 72, torch.bfloat16, embedding_dtype)
    for splits in (1, 2, 5, 1000):
        results = []
        for stages in (2, 3, 4):
            with hopper.overridden(stages=stages):
                results.append(hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU, splits=splits))
            assert hopper.plan["kernel"] == HOPPER
            assert hopper.plan["stages"] == stages
            assert hopper.plan["splits"] == {5: 4, 1000: 16}.get(splits, splits)  # of 16 steps, none empty
            assert torch.equal(results[-1][1], results[0][1])
        check(reference, *results[0], z, lse, embedding, hard, weight)


def test_an_embedding_that_tma_cannot_read(hopper, reference):
    """Rows off 16-byte boundaries: the kernel for sm_80, and Hopper's refused."""
    z, lse, embedding, hard, weight = inputs(reference, 9, 100, 30, torch.bfloat16, torch.bfloat16)
    output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["kernel"] == AMPERE
    check(reference, output, soft, z, lse, embedding, hard, weight)
    refused = f"kernel must be {AMPERE} for unaligned bfloat16 embeddings on sm_90, got {HOPPER}"
    with hopper.overridden(kernel=HOPPER), pytest.raises(RuntimeError, match=refused):
        hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({"kernel": "gemm"}, f"kernel must be one of {HOPPER}, {AMPERE} for bfloat16 embeddings on sm_90, got gemm"),
        ({"block_m": 32}, f"block_m must be one of 64, 128, 192 for {HOPPER}, got 32"),
        ({"kernel": AMPERE, "block_m": 32}, f"block_m must be one of 16, 64, 128 for {AMPERE}, got 32"),
        ({"block_n": 128}, f"block_n must be 256 for {HOPPER}, got 128"),
        ({"block_k": 32}, f"block_k must be 64 for {HOPPER}, got 32"),
        ({"stages": 6}, f"stages must be one of 2, 3, 4, 5 for {HOPPER}, got 6"),
        ({"kernel": AMPERE, "stages": 3}, f"stages must be 4 for {AMPERE}, got 3"),
        ({"cluster_m": 3}, f"cluster_m must be one of 1, 2, 4 for {HOPPER}, got 3"),
        ({"kernel": AMPERE, "cluster_m": 2}, f"cluster_m must be 1 for {AMPERE}, got 2"),
        ({"cluster_n": 2}, f"cluster_n must be 1 for {HOPPER}, got 2"),
    ],
)
def test_overrides_that_were_not_built(hopper, reference, overrides, refused):
    z, lse, embedding, hard, weight = inputs(reference, 2, 70, 16, torch.bfloat16, torch.bfloat16)
    with hopper.overridden(**overrides), pytest.raises(RuntimeError, match=refused):
        hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
