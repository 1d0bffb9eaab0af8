"""What only Hopper's kernel of the relaxed embedding has: wide tiles, clusters, TMA and its limits."""

import math
import subprocess
from itertools import product

import pytest
import torch

from support.cases import DTYPES, placed
from support.relaxed_embeddings import TAU, ask, check, count, inputs, launches

pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2)]
HOPPER, AMPERE = "relaxed_embedding_sm90", "relaxed_embedding_sm80"
# Logits and embedding of one type, or fp32 logits.
PAIRS = [(z, e) for z, e in product(DTYPES, DTYPES[:2]) if z in (e, torch.float32)]
CLUSTERS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("dim", [8, 64, 65, 256, 264, 520])
@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 200, 257])
def test_tiles(hopper, reference, n, dim):
    """Whatever tile and cluster the plan chooses; rows, columns and ids that do not fill the last of them."""
    z, lse, embedding, hard, weight = inputs(reference, n, 321, dim, *PAIRS[(n + dim // 8) % 4])
    output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["kernel"] == HOPPER
    assert hopper.plan["tile"] in ([(64, 256, 64)] if n <= 64 else [(128, 256, 64), (192, 192, 64)])
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize(("logits_dtype", "embedding_dtype"), PAIRS)
@pytest.mark.parametrize(("block_m", "columns"), [(64, 256), (128, 256), (192, 192)])
def test_every_tile(hopper, reference, logits_dtype, embedding_dtype, block_m, columns):
    z, lse, embedding, hard, weight = inputs(reference, 193, 321, 264, logits_dtype, embedding_dtype)
    with hopper.overridden(block_m=block_m):
        output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["tile"] == (block_m, columns, 64)
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize(("logits_dtype", "embedding_dtype"), PAIRS)
@pytest.mark.parametrize("vocab", [1, 15, 16, 63, 64, 65, 447])
def test_tails_of_the_vocabulary(hopper, reference, logits_dtype, embedding_dtype, vocab):
    """What lies past the end of a row is NaN, of the embedding infinite; e^(0 - lse) would be infinite too."""
    z, _, embedding, hard, weight = inputs(reference, 70, vocab, 40, logits_dtype, embedding_dtype)
    z[2:] -= 200
    lse = reference.logit_statistics(z, TAU).logsumexp
    rows = torch.full((vocab + 3, 40), math.inf, dtype=embedding_dtype)
    rows[:vocab] = embedding
    output, soft = hopper.relaxed_embedding(z, lse, rows[:vocab], hard, weight, TAU, splits=2)
    assert hopper.plan["kernel"] == HOPPER
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "block_m"), [(20, 64), (129, 64), (300, 128), (640, 128), (193, 192), (400, 192)])
def test_clusters_agree(hopper, reference, n, block_m, logits_dtype):
    """CTAs that share the embedding or the logits, row tiles left over, columns that do not fill a cluster.

    Eight steps through two stages: each is refilled when all that read it have left it.
    """
    z, lse, embedding, hard, weight = inputs(reference, n, 450, 264, logits_dtype, torch.bfloat16)
    results = []
    for m, columns in CLUSTERS:
        with hopper.overridden(block_m=block_m, cluster_m=m, cluster_n=columns, splits=1, stages=2):
            results.append(hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU))
        assert hopper.plan["cluster"] == (m, columns)
        assert hopper.plan["grid"] % (m * columns) == 0
        assert torch.equal(results[-1][0], results[0][0])
        assert torch.equal(results[-1][1], results[0][1])
    check(reference, *results[0], z, lse, embedding, hard, weight)


@pytest.mark.parametrize(("dim", "cluster"), [(72, (4, 1)), (600, (4, 1)), (600, (2, 1))])
def test_clusters_that_columns_do_not_fill(hopper, reference, dim, cluster):
    """Row tiles left over, and one or three tiles of columns: some CTAs of a cluster have nothing to do."""
    z, lse, embedding, hard, weight = inputs(reference, 321, 200, dim, torch.bfloat16, torch.bfloat16)
    with hopper.overridden(block_m=64, block_n=256, cluster_m=cluster[0], splits=1):
        output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["cluster"] == cluster
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("cluster", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("gone", [slice(0, 128), slice(0, 256), slice(128, 300), slice(0, 299), slice(0, 300)])
def test_tiles_of_padding(hopper, reference, cluster, gone):
    """A CTA without rows still feeds those it shares with; where none of them has rows, they end at once."""
    z, lse, embedding, hard, weight = inputs(reference, 300, 200, 264, torch.bfloat16, torch.bfloat16)
    rows = torch.arange(300)
    rows[gone] = -1
    here = rows >= 0
    z[~here], lse[~here] = math.nan, math.nan
    output, soft = torch.full((300, 264), -7.0, dtype=torch.bfloat16), torch.full((300, 264), -7.0)
    with hopper.overridden(block_m=128, cluster_m=cluster[0], cluster_n=cluster[1]):
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
    assert counted["tma_load_bytes"] == 256 * (256 + 128) * 2


@pytest.mark.parametrize(("logits_dtype", "embedding_dtype"), PAIRS)
@pytest.mark.parametrize("block_m", [64, 128, 192])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_padding_holds_counts_for_nothing(hopper, reference, logits_dtype, embedding_dtype, block_m, value):
    """Rows of padding between the others are read with them; bit for bit, the others do not see it."""
    z, lse, embedding, hard, weight = inputs(reference, 197, 330, 72, logits_dtype, embedding_dtype)
    rows = torch.arange(197)
    rows[torch.randperm(197, generator=torch.Generator().manual_seed(1))[:60]] = -1
    here = rows >= 0
    results = []
    for content in (0.0, value):
        z[~here], lse[~here] = content, math.nan
        output, soft = torch.zeros(197, 72, dtype=embedding_dtype), torch.zeros(197, 72)
        with hopper.overridden(block_m=block_m, splits=1, stages=2):
            hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU, rows=rows, output=output, soft=soft)
        results.append((output, soft))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    check(reference, output[here], soft[here], z[here], lse[here], embedding, hard[here], weight[here])


@pytest.mark.parametrize(("logits_dtype", "embedding_dtype"), PAIRS)
def test_logits_are_read_without_bank_conflicts(hopper, reference, tmp_path, logits_dtype, embedding_dtype):
    z, lse, embedding, hard, weight = inputs(reference, 130, 256, 72, logits_dtype, embedding_dtype)
    counted, _ = launches(hopper, tmp_path, z, lse, embedding, hard, weight, TAU)
    kind = "shared_load" if logits_dtype == torch.float32 else "ldmatrix"
    assert counted[f"{kind}_conflict_degree"] == 1


@pytest.mark.parametrize("vocab", [30_522, 30_523])
def test_vocabularies_of_any_size_in_aligned_rows(hopper, reference, vocab):
    """Rows that start at 16-byte boundaries take the fast kernel, wherever they end."""
    z, lse, embedding, hard, weight = inputs(reference, 3, vocab, 8, torch.bfloat16, torch.bfloat16)
    output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    assert hopper.plan["kernel"] == HOPPER
    check(reference, output, soft, z, lse, embedding, hard, weight)


@pytest.mark.parametrize("embedding_dtype", DTYPES[:2])
@pytest.mark.parametrize("n", [4, 70])
def test_splits_and_stages(hopper, reference, embedding_dtype, n):
    z, lse, embedding, hard, weight = inputs(reference, n, 999, 72, embedding_dtype, embedding_dtype)
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


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("embedding_dtype", DTYPES[:2])
@pytest.mark.parametrize("unaligned", ["", "logits", "embedding"])
def test_what_hopper_cannot_serve(hopper, reference, logits_dtype, embedding_dtype, unaligned):
    """Rows off 16-byte boundaries and 16-bit logits of another type: the kernel for sm_80, and Hopper's refused."""
    z, lse, embedding, hard, weight = inputs(reference, 9, 101, 31, logits_dtype, embedding_dtype)
    z = placed(z, 0, 0) if unaligned == "logits" else z
    embedding = placed(embedding, 8, 2) if unaligned == "embedding" else embedding
    output, soft = hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)
    can = not unaligned and (logits_dtype, embedding_dtype) in PAIRS
    assert hopper.plan["kernel"] == (HOPPER if can else AMPERE)
    check(reference, output, soft, z, lse, embedding, hard, weight)
    if not can:
        names = [
            ("unaligned " if unaligned == which else "") + str(dtype)[6:]
            for which, dtype in (("logits", logits_dtype), ("embedding", embedding_dtype))
        ]
        refused = f"kernel must be {AMPERE} for {names[0]} logits and {names[1]} embeddings on sm_90, got {HOPPER}"
        with hopper.overridden(kernel=HOPPER), pytest.raises(RuntimeError, match=refused):
            hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({"kernel": "gemm"}, f"kernel must be one of {HOPPER}, {AMPERE} for bfloat16 logits and .*, got gemm"),
        ({"block_m": 32}, f"block_m must be one of 64, 128, 192 for {HOPPER}, got 32"),
        ({"kernel": AMPERE, "block_m": 32}, f"block_m must be one of 16, 64, 128 for {AMPERE}, got 32"),
        ({"block_n": 128}, f"block_n must be 256 for {HOPPER}, got 128"),
        ({"block_k": 32}, f"block_k must be 64 for {HOPPER}, got 32"),
        ({"stages": 6}, f"stages must be one of 2, 3, 4, 5 for {HOPPER}, got 6"),
        ({"kernel": AMPERE, "stages": 3}, f"stages must be 4 for {AMPERE}, got 3"),
        ({"cluster_m": 3}, f"cluster_m must be one of 1, 2, 4 for {HOPPER}, got 3"),
        ({"kernel": AMPERE, "cluster_m": 2}, f"cluster_m must be 1 for {AMPERE}, got 2"),
        ({"cluster_n": 2}, f"cluster_n must be 1 for {HOPPER}, got 2"),  # one tile of columns
        ({"kernel": AMPERE, "cluster_n": 2}, f"cluster_n must be 1 for {AMPERE}, got 2"),
    ],
)
def test_overrides_that_were_not_built(hopper, reference, overrides, refused):
    z, lse, embedding, hard, weight = inputs(reference, 2, 70, 16, torch.bfloat16, torch.bfloat16)
    with hopper.overridden(**overrides), pytest.raises(RuntimeError, match=refused):
        hopper.relaxed_embedding(z, lse, embedding, hard, weight, TAU)


def test_clusters_that_were_not_built(hopper):
    """Pairs along the columns, of whole pairs of tiles, in at most four CTAs."""
    shape = {"n": 512, "vocab": 152_064, "dim": 2048}
    (plan,) = ask(hopper, "plan", shape | {"cluster_n": 2})
    assert plan["tile"] == [128, 256, 64]  # 11 tiles of 192 columns have no pairs
    for wanted, refused in (
        ({"cluster_n": 4}, "cluster_n must be one of 1, 2 for"),
        ({"cluster_m": 4, "cluster_n": 2}, "cluster_n must be 1 for"),
        ({"block_m": 192, "cluster_n": 2}, "cluster_n must be 1 for"),
    ):
        with pytest.raises(subprocess.CalledProcessError) as error:
            ask(hopper, "plan", shape | wanted)
        assert refused in error.value.stderr


def test_plans_fit_the_clusters_of_the_device(hopper):
    """Where 31 clusters of four fit, not 32, no plan takes a second wave for the last; without any, none is made."""
    shapes = [
        {"n": n, "vocab": 152_064, "dim": dim, "logits_dtype": dtype, "num_sms": 132}
        for n, dim, dtype in product(range(96, 1025, 32), (1024, 2048, 4096), ("bfloat16", "float32"))
    ]
    used = set()
    for device in ({"clusters_of_4": 31}, {"clusters_of_4": 0}, {"clusters_of_2": 0, "clusters_of_4": 0}):
        resident = {1: 132, 2: 66, 4: 33} | {int(name[-1]): clusters for name, clusters in device.items()}
        for shape, plan in zip(shapes, ask(hopper, "plan", *(s | device for s in shapes)), strict=True):
            m, n = plan["cluster"]
            used.add((m, n))
            assert resident[m * n] > 0
            clusters = plan["grid"] // (m * n)
            waves = -(-clusters // resident[m * n])
            # One part less would take as many waves less as it has clusters: the last wave is not a remainder.
            assert clusters > 0.8 * waves * resident[m * n] or plan["splits"] == 1, (shape, plan)
    assert used >= {(1, 1), (2, 1)}
    (plan,) = ask(hopper, "plan", {**shapes[0], "clusters_of_4": 0, "clusters_of_2": 0})
    assert plan["kernel"] == HOPPER
    with pytest.raises(subprocess.CalledProcessError) as error:
        ask(hopper, "plan", {**shapes[0], "clusters_of_4": 0, "cluster_m": 4})
    assert "cluster_m must be one of 1, 2 for" in error.value.stderr
