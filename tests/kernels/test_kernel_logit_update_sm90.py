"""What only Hopper's kernel of the logit update has: TMA, clusters, two consumers in turn, and their edges."""

import math

import pytest
import torch
from cases import DTYPES, placed
from test_kernel_logit_update import ADAM, AMPERE, TAU, check_adam, check_gradient, inputs
from test_kernel_plan import bindings  # noqa: F401

pytestmark = pytest.mark.simulator
HOPPER = "logit_update_sm90"
CLUSTERS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("dim", [8, 64, 72, 520])
@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 257, 300])
def test_tiles(hopper, reference, n, dim):
    """Tiles of 64 x 256 and 128 x 128, the last of each row and column not full, d not full."""
    logits_dtype, embedding_dtype = DTYPES[(n + dim // 8) % 3], DTYPES[(n + dim // 8) % 2]
    for vocab in (515, 516):  # logits one by one, and four at a time
        arguments = inputs(reference, n, vocab, dim, logits_dtype, embedding_dtype)
        got = hopper.logit_gradient(*arguments, None, TAU)
        assert hopper.plan["kernel"] == HOPPER
        assert hopper.plan["tile"] == ((64, 256, 64) if n <= 64 else (128, 128, 64))
        check_gradient(reference, got, *arguments)


@pytest.mark.parametrize("vocab", [1, 3, 4, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("n", [3, 70])
def test_tails_of_the_vocabulary(hopper, reference, n, vocab):
    """What lies past the last id is NaN, in E and in the logits."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 40, torch.bfloat16, torch.bfloat16)
    table = torch.full((vocab + 300, 40), math.nan, dtype=torch.bfloat16)
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
    arguments = inputs(reference, n, 650, 200, torch.bfloat16, torch.bfloat16)
    results = []
    for m, n_ in CLUSTERS:
        with hopper.overridden(cluster_m=m, cluster_n=n_):
            results.append(hopper.logit_gradient(*arguments, None, TAU))
        assert hopper.plan["cluster"] == (m, n_)
        assert hopper.plan["grid"] % (m * n_) == 0
        assert torch.equal(results[-1], results[0])
    check_gradient(reference, results[0], *arguments)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("n", "vocab", "dim"), [(300, 1100, 136), (40, 1800, 72), (130, 520, 328), (5, 300, 64)])
def test_one_cluster_takes_all_tiles(hopper, reference, cluster, n, vocab, dim):
    """The ring and both consumers go round many times, an odd number of tiles included; the grid does not matter."""
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, dim, torch.bfloat16, torch.bfloat16)
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


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("n", [20, 129])
@pytest.mark.parametrize("aligned", [True, False])
def test_steps(hopper, reference, logits_dtype, n, aligned):
    """First step (moments unwritten memory), middle, last (moments left alone), with vectors and one by one."""
    vocab = 396
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 72, logits_dtype, torch.float16)
    rest = (grad, lse, embedding, soft, None, TAU)
    m, v = torch.empty(n, vocab), torch.empty(n, vocab)
    if not aligned:
        z, m, v = placed(z, 1, 3), placed(m, 2, 1), placed(v, 0, 5)
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
    grad, z, lse, embedding, soft = inputs(reference, n, vocab, 64, torch.bfloat16, torch.bfloat16)
    padding = torch.arange(n) % 5 < 2
    rows = torch.randperm(n)
    everywhere = torch.full((n, 64), math.nan, dtype=torch.bfloat16)
    everywhere[rows] = grad
    everywhere[rows[padding]] = math.nan
    rows[padding] = torch.tensor([-1, n])[torch.arange(int(padding.sum())) % 2]
    z_, lse_, soft_ = z.clone(), lse.clone(), soft.clone()
    for x in (z_, lse_, soft_):
        x[padding] = math.nan
    got = hopper.logit_gradient(everywhere, z_, lse_, embedding, soft_, rows, TAU)
    assert hopper.plan["kernel"] == HOPPER
    assert (got[padding] == 0).all()
    here = ~padding
    check_gradient(reference, got[here], grad[here], z[here], lse[here], embedding, soft[here])
    m, v = torch.full((n, vocab), math.nan), torch.full((n, vocab), math.nan)
    m[here], v[here] = 0.0, 0.0
    hopper.adam_step_(z_, m, v, everywhere, lse_, embedding, soft_, rows, TAU, step=2, last=False, **ADAM)
    for x in (z_, m, v):
        assert torch.isnan(x[padding]).all()
        assert torch.isfinite(x[here]).all()
    zeros = torch.zeros(int(here.sum()), vocab)
    check_adam(reference, z_[here], m[here], v[here], z[here], zeros, zeros, got[here], step=2)


def test_a_bad_row_of_g_stays_alone(hopper, reference):
    grad, z, lse, embedding, soft = inputs(reference, 70, 260, 64, torch.bfloat16, torch.bfloat16)
    grad[3] = math.nan
    got = hopper.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    good = torch.arange(70) != 3
    assert torch.isnan(got[3]).all()
    check_gradient(reference, got[good], grad[good], z[good], lse[good], embedding, soft[good])


@pytest.mark.parametrize("dim", [63, 68])
def test_unaligned_embeddings_fall_back(hopper, reference, dim):
    arguments = inputs(reference, 70, 260, dim, torch.bfloat16, torch.bfloat16)
    got = hopper.logit_gradient(*arguments, None, TAU)
    assert hopper.plan["kernel"] == AMPERE
    check_gradient(reference, got, *arguments)
    grad, z, lse, embedding, soft = arguments
    padded = placed(embedding, 8, 8 - dim % 8)  # d need not be a multiple, if the rows start at 16 bytes
    got = hopper.logit_gradient(grad, z, lse, padded, soft, None, TAU)
    assert hopper.plan["kernel"] == HOPPER
    check_gradient(reference, got, *arguments)


@pytest.mark.parametrize(
    ("overrides", "dtype", "dim", "message"),
    [
        ({"kernel": "x"}, "bfloat16", 64, f"kernel must be {HOPPER} or {AMPERE} for bfloat16 embeddings, got x"),
        ({"kernel": HOPPER}, "float32", 64, f"kernel must be logit_update_simt for float32 embeddings, got {HOPPER}"),
        ({"kernel": HOPPER}, "float16", 60, f"kernel must be {AMPERE} for float16 embeddings whose rows do not start"),
        ({"block_m": 16}, "bfloat16", 64, f"block_m must be 64 or 128 in this tile of {HOPPER}, got 16"),
        ({"block_m": 64, "block_n": 128}, "bfloat16", 64, f"block_n must be 256 in this tile of {HOPPER}, got 128"),
        ({"stages": 9}, "bfloat16", 64, f"stages must be 3 or 4 in this tile of {HOPPER}, got 9"),
        ({"cluster_m": 4}, "bfloat16", 64, f"cluster_m must be 1 or 2 for {HOPPER}, got 4"),
        ({"kernel": AMPERE, "cluster_n": 2}, "bfloat16", 64, f"cluster_n must be 1 for {AMPERE}, got 2"),
    ],
)
def test_overrides_are_served_or_refused(hopper, reference, overrides, dtype, dim, message):
    arguments = inputs(reference, 20, 100, dim, torch.bfloat16, getattr(torch, dtype))
    with hopper.overridden(**overrides), pytest.raises(RuntimeError, match=message):
        hopper.logit_gradient(*arguments, None, TAU)


@pytest.mark.parametrize("tile", [(64, 256), (128, 128)])
def test_any_tile_serves_any_rows(hopper, reference, tile):
    for n in (9, 140):
        arguments = inputs(reference, n, 300, 64, torch.bfloat16, torch.bfloat16)
        with hopper.overridden(block_m=tile[0], block_n=tile[1]):
            got = hopper.logit_gradient(*arguments, None, TAU)
        assert hopper.plan["tile"] == (*tile, 64)
        check_gradient(reference, got, *arguments)


@pytest.mark.parametrize(("vocab", "kernel"), [(2**31 - 1, HOPPER), (2**31, AMPERE)])
def test_more_ids_than_tma_counts_fall_back(bindings, vocab, kernel):  # noqa: F811
    where = {"arch": 90, "num_sms": 132}
    assert bindings.plan("adam_step_", 8, vocab, 64, **where)["kernel"] == kernel
