"""What only Hopper's kernel of the logit update has: TMA, clusters, two consumers in turn, and their edges."""

import math

import pytest
import torch

from support.cases import placed
from support.logit_updates import ADAM, TAU, aligned, check_adam, check_gradient
from support.logit_updates import inputs as dense_inputs

pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2)]
HOPPER, AMPERE = "logit_update_sm90", "logit_update_sm80"
SIMT, MATMUL = "logit_update_simt", "logit_update_matmul"
CLUSTERS = [(1, 1), (2, 1), (1, 2), (2, 2)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)]  # logits and embeddings


def inputs(*arguments):
    grad, z, lse, embedding, soft = dense_inputs(*arguments)
    return grad, aligned(z), lse, embedding, soft


def between(matrix):
    """What the storage of a matrix holds beside it, as bits."""
    storage = torch.empty(0, dtype=matrix.dtype).set_(matrix.untyped_storage())
    outside = torch.ones(storage.shape, dtype=torch.bool)
    outside.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset()).fill_(False)
    return storage[outside].view(torch.int16 if matrix.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dim", [8, 64, 72, 520])
@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 257, 300])
def test_tiles(hopper, reference, n, dim):
    """Tiles of 64 x 256 and 128 x 128, the last of each row and column not full, d not full."""
    for vocab in (515, 516):  # with and without columns after the last four
        arguments = inputs(reference, n, vocab, dim, *PAIRS[(n + dim // 8) % 4])
        got = hopper.logit_gradient(*arguments, None, TAU)
        assert hopper.plan["kernel"] == HOPPER
        assert hopper.plan["tile"] == ((64, 256, 64) if n <= 64 else (128, 128, 64))
        check_gradient(reference, got, *arguments)


@pytest.mark.parametrize("vocab", [1, 3, 4, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("n", [3, 70])
def test_tails_of_the_vocabulary(hopper, reference, n, vocab):
    """What lies past the last id is NaN, in E and in the logits."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 40, BF16, BF16)
    table = torch.full((vocab + 300, 40), math.nan, dtype=BF16)
    table[:vocab] = embedding
    got = hopper.logit_gradient(grad, placed(z, 8, 8 + -vocab % 8), lse, table[:vocab], soft, None, TAU)
    assert hopper.plan["kernel"] == HOPPER
    if vocab == 1:  # q = 1 and E = e_soft: what is left is rounding
        assert got.abs().max() <= 1e-5
    else:
        check_gradient(reference, got, grad, z, lse, embedding, soft)


@pytest.mark.parametrize("n", [20, 70, 200, 300])
def test_clusters_agree(hopper, reference, n):
    """One, two or four CTAs that share G and E, with CTAs that have no rows, no ids, or neither: the same bits."""
    arguments = inputs(reference, n, 650, 200, BF16, BF16)
    results = []
    for m, n_ in CLUSTERS:
        with hopper.overridden(cluster_m=m, cluster_n=n_):
            results.append(hopper.logit_gradient(*arguments, None, TAU))
        assert hopper.plan["cluster"] == (m, n_)
        assert hopper.plan["grid"] % (m * n_) == 0
        assert torch.equal(results[-1], results[0])
    check_gradient(reference, results[0], *arguments)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("n", "vocab", "dim"), [(300, 1104, 136), (40, 1800, 72), (130, 520, 328), (5, 296, 64)])
def test_one_cluster_takes_all_tiles(hopper, reference, cluster, n, vocab, dim):
    """The ring and both consumers go round many times, an odd number of tiles included; the grid does not matter."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, dim, BF16, BF16)
    rest = (grad, lse, embedding, soft, None, TAU)
    results = []
    for splits in (1, 2, 0):
        updated, m, v = z.clone(), torch.ones(n, vocab), torch.ones(n, vocab)
        with hopper.overridden(cluster_m=cluster[0], cluster_n=cluster[1], splits=splits):
            hopper.adam_step_(updated, m, v, *rest, step=2, last=False, **ADAM)
        assert hopper.plan["kernel"] == HOPPER
        if splits == 1:
            assert hopper.plan["grid"] == cluster[0] * cluster[1]
        results.append((updated, m, v))
        assert all(torch.equal(x, y) for x, y in zip(results[0], results[-1], strict=True))
    gradient = hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    check_gradient(reference, gradient, grad, z, lse, embedding, soft)
    ones = torch.ones(n, vocab)
    check_adam(reference, *results[0], z, ones, ones, gradient, step=2)


@pytest.mark.parametrize(("logits_dtype", "embedding_dtype"), PAIRS)
@pytest.mark.parametrize("n", [20, 129])
@pytest.mark.parametrize("vocab", [392, 395])
def test_steps(hopper, reference, logits_dtype, embedding_dtype, n, vocab):
    """First step (moments unwritten memory), middle, last (moments left alone)."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 72, logits_dtype, embedding_dtype)
    rest = (grad, lse, embedding, soft, None, TAU)
    m, v = aligned(torch.empty(n, vocab)), aligned(torch.empty(n, vocab))
    before = z.clone(), torch.zeros(n, vocab), torch.zeros(n, vocab)
    for step in (1, 2, 3):
        gradient = hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
        new = ("exp_avg", "exp_avg_sq") if step == 1 else ()
        hopper.adam_step_(z, m, v, *rest, step=step, last=step == 3, new=new, **ADAM)
        assert hopper.plan["kernel"] == HOPPER
        if step < 3:
            check_adam(reference, z, m, v, *before, gradient, step=step)
            before = z.clone(), m.clone(), v.clone()
        else:
            check_adam(reference, z, None, None, *before, gradient, step=step)
            assert torch.equal(m, before[1])
            assert torch.equal(v, before[2])
    start = z.clone()
    gradient = hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    hopper.sgd_step_(z, *rest, lr=0.5)
    torch.testing.assert_close(z, (start.float() + 0.5 * gradient).to(logits_dtype), atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("vocab", [260, 261])
@pytest.mark.parametrize("n", [40, 200])
def test_padding_is_neither_read_nor_written(hopper, reference, n, vocab):
    """Padding rows of all inputs hold NaN and stay as they are; only a gradient of 0 is written for them."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 64, BF16, BF16)
    padding = torch.arange(n) % 5 < 2
    rows = torch.randperm(n)
    everywhere = torch.full((n, 64), math.nan, dtype=BF16)
    everywhere[rows] = grad
    everywhere[rows[padding]] = math.nan
    rows[padding] = torch.tensor([-1, n])[torch.arange(int(padding.sum())) % 2]
    z_, lse_, soft_ = aligned(z), lse.clone(), soft.clone()
    for x in (z_, lse_, soft_):
        x[padding] = math.nan
    got = hopper.logit_gradient(everywhere, z_, lse_, embedding, soft_, rows, TAU)
    assert hopper.plan["kernel"] == HOPPER
    assert (got[padding] == 0).all()
    here = ~padding
    check_gradient(reference, got[here], grad[here], z[here], lse[here], embedding, soft[here])
    m, v = aligned(torch.full((n, vocab), math.nan)), aligned(torch.full((n, vocab), math.nan))
    m[here], v[here] = 0.0, 0.0
    hopper.adam_step_(z_, m, v, everywhere, lse_, embedding, soft_, rows, TAU, step=2, last=False, **ADAM)
    for x in (z_, m, v):
        assert torch.isnan(x[padding]).all()
        assert torch.isfinite(x[here]).all()
    zeros = torch.zeros(int(here.sum()), vocab)
    check_adam(reference, z_[here], m[here], v[here], z[here], zeros, zeros, got[here], step=2)


def test_a_bad_row_of_g_stays_alone(hopper, reference):
    grad, z, lse, embedding, soft = inputs(reference, 70, 260, 64, BF16, BF16)
    grad[3] = math.nan
    got = hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    good = torch.arange(70) != 3
    assert torch.isnan(got[3]).all()
    check_gradient(reference, got[good], grad[good], z[good], lse[good], embedding, soft[good])


@pytest.mark.parametrize(
    ("n", "vocab", "pair"),
    [(3, 30_522, 0), (70, 1001, 1), (20, 257, 2), (130, 258, 0), (6, 131, 3), (2, 3, 0), (66, 1, 2)],
)
def test_what_lies_between_rows_is_left_alone(hopper, reference, n, vocab, pair):
    """Columns after the last four of V: the matrices' own, the padding of their rows, and nothing past the end."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 40, *PAIRS[pair])
    if vocab == 1:  # nothing else has a gradient
        soft = torch.zeros_like(soft)
    start, gradient = z.clone(), aligned(torch.full((n, vocab), 5.0))
    m, v = aligned(torch.full((n, vocab), 0.01)), aligned(torch.full((n, vocab), 0.02))
    matrices = z, m, v, gradient
    guards = [between(x) for x in matrices]
    rest = grad, lse, embedding, soft, None, TAU
    hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU, gradient)
    assert hopper.plan["kernel"] == HOPPER
    before = m.clone(), v.clone()
    hopper.adam_step_(z, m, v, *rest, step=2, last=False, **ADAM)
    assert hopper.plan["kernel"] == HOPPER
    check_gradient(reference, gradient, grad, start, lse, embedding, soft)
    check_adam(reference, z, m, v, start, *before, gradient, step=2)
    updated = z.clone()
    hopper.sgd_step_(z, *rest, lr=0.0)
    assert torch.equal(z, updated)
    assert all(torch.equal(between(x), guard) for x, guard in zip(matrices, guards, strict=True))


@pytest.mark.parametrize("name", ["z", "m", "v", "gradient"])
def test_unaligned_rows_fall_back(hopper, reference, name):
    """Of any matrix that the update touches."""
    n, vocab = 70, 263
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 64, BF16, BF16)
    start = z.clone()
    matrices = {"z": z, "m": aligned(torch.zeros(n, vocab)), "v": aligned(torch.zeros(n, vocab))}
    matrices["gradient"] = aligned(torch.zeros(n, vocab))
    matrices[name] = placed(matrices[name], 4, 3)  # no row but at eight bytes
    z, m, v, gradient = matrices.values()
    hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU, gradient)
    assert hopper.plan["kernel"] == (AMPERE if name in ("z", "gradient") else HOPPER)
    check_gradient(reference, gradient, grad, z, lse, embedding, soft)
    rest = (grad, lse, embedding, soft, None, TAU)
    hopper.adam_step_(z, m, v, *rest, step=2, last=False, **ADAM)
    assert hopper.plan["kernel"] == (AMPERE if name in ("z", "m", "v") else HOPPER)
    zeros = torch.zeros(n, vocab)
    check_adam(reference, z, m, v, start, zeros, zeros, gradient, step=2)
    if name == "m":
        refused = f"kernel must be {AMPERE} for bfloat16 embeddings and logits, moments or a gradient whose rows do not"
        with hopper.overridden(kernel=HOPPER), pytest.raises(RuntimeError, match=refused):
            hopper.adam_step_(z, m, v, *rest, step=2, last=False, **ADAM)


@pytest.mark.parametrize("pair", [(BF16, FP16), (FP16, BF16)])
def test_other_dtypes_fall_back(hopper, reference, pair):
    arguments = inputs(reference, 70, 264, 64, *pair)
    got = hopper.logit_gradient(*arguments, None, TAU)
    assert hopper.plan["kernel"] == AMPERE
    check_gradient(reference, got, *arguments)


@pytest.mark.parametrize("dim", [63, 68])
def test_unaligned_embeddings_fall_back(hopper, reference, dim):
    arguments = inputs(reference, 70, 260, dim, BF16, BF16)
    got = hopper.logit_gradient(*arguments, None, TAU)
    assert hopper.plan["kernel"] == AMPERE
    check_gradient(reference, got, *arguments)
    grad, z, lse, embedding, soft = arguments
    padded = placed(embedding, 8, 8 - dim % 8)  # d need not be a multiple, if the rows start at 16 bytes
    got = hopper.logit_gradient(grad, z, lse, padded, soft, None, TAU)
    assert hopper.plan["kernel"] == HOPPER
    check_gradient(reference, got, *arguments)


@pytest.mark.parametrize(
    ("overrides", "pair", "dim", "message"),
    [
        ({"kernel": "x"}, (BF16, BF16), 64, f"kernel must be {HOPPER} or {AMPERE} for bfloat16 embeddings, got x"),
        (
            {"kernel": HOPPER},
            (BF16, FP32),
            64,
            f"kernel must be {SIMT} or {MATMUL} for float32 embeddings, got {HOPPER}",
        ),
        ({"kernel": HOPPER}, (FP16, FP16), 60, f"kernel must be {AMPERE} for float16 embeddings whose rows do not"),
        ({"kernel": HOPPER}, (BF16, FP16), 64, f"kernel must be {AMPERE} for float16 embeddings and bfloat16 logits"),
        ({"kernel": HOPPER}, (FP16, BF16), 64, f"kernel must be {AMPERE} for bfloat16 embeddings and float16 logits"),
        ({"block_m": 16}, (BF16, BF16), 64, f"block_m must be 64 or 128 in this tile of {HOPPER}, got 16"),
        ({"block_m": 64, "block_n": 128}, (BF16, BF16), 64, f"block_n must be 256 in this tile of {HOPPER}, got 128"),
        ({"stages": 9}, (BF16, BF16), 64, f"stages must be 3 or 4 in this tile of {HOPPER}, got 9"),
        ({"cluster_m": 4}, (BF16, BF16), 64, f"cluster_m must be 1 or 2 for {HOPPER}, got 4"),
        ({"kernel": AMPERE, "cluster_n": 2}, (BF16, BF16), 64, f"cluster_n must be 1 for {AMPERE}, got 2"),
    ],
)
def test_overrides_are_served_or_refused(hopper, reference, overrides, pair, dim, message):
    arguments = inputs(reference, 20, 100, dim, *pair)
    with hopper.overridden(**overrides), pytest.raises(RuntimeError, match=message):
        hopper.logit_gradient(*arguments, None, TAU)


@pytest.mark.parametrize("tile", [(64, 256), (128, 128)])
def test_any_tile_serves_any_rows(hopper, reference, tile):
    for n in (9, 140):
        arguments = inputs(reference, n, 300, 64, BF16, BF16)
        with hopper.overridden(block_m=tile[0], block_n=tile[1]):
            got = hopper.logit_gradient(*arguments, None, TAU)
        assert hopper.plan["tile"] == (*tile, 64)
        check_gradient(reference, got, *arguments)


WHERE = {"arch": 90, "num_sms": 132}


@pytest.mark.parametrize(("vocab", "kernel"), [(2**31 - 1, HOPPER), (2**31, AMPERE)])
def test_more_ids_than_tma_counts_fall_back(bindings, vocab, kernel):
    assert bindings.plan("adam_step_", 8, vocab, 64, **WHERE)["kernel"] == kernel


@pytest.mark.parametrize(
    ("n", "resident", "cluster", "grid"),
    [
        (512, {"clusters_of_4": 32}, (2, 2), 128),
        (512, {"clusters_of_4": 31}, (2, 2), 124),  # no second wave
        (512, {"clusters_of_4": 0}, (1, 2), 132),  # none of four run: smaller ones
        (512, {"clusters_of_4": 0, "clusters_of_2": 60}, (1, 2), 120),
        (512, {"clusters_of_4": 0, "clusters_of_2": 0}, (1, 1), 132),
        (64, {"clusters_of_2": 0}, (1, 1), 132),
        (100_000, {"num_sms": 1, "clusters_of_4": 0, "clusters_of_2": 0}, (1, 1), 1),
    ],
)
def test_clusters_are_those_that_run_at_once(bindings, n, resident, cluster, grid):
    plan = bindings.plan("adam_step_", n, 152_064, 2048, **WHERE | resident)
    assert (plan["cluster"], plan["grid"]) == (cluster, grid)


def test_a_forced_cluster_has_a_grid(bindings):
    """Even where the device runs none: what follows is the launch's error, not an empty grid."""
    plan = bindings.plan("adam_step_", 512, 152_064, 2048, cluster_m=2, cluster_n=2, clusters_of_4=0, **WHERE)
    assert plan["grid"] == 4
