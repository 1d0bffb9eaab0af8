"""Statistics and draws of the vocabulary pass against ``entrgi_ext.reference``."""

import math

import pytest
import torch

from support.cases import DTYPES, EPS32, error, placed, row_keys
from support.draws import check_draw, check_statistics, logits, require_hopper, sampled

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.grid(strength=2, only=lambda p: p["variant"] == "chosen" or p["kernels"] == "compute_90a"),
]
CLUSTER = {"kernel": "vocab_pass_sm90", "cluster_n": 8, "splits": 0}  # splits of the tests are for vocab_pass


@pytest.fixture(params=["chosen", "vocab_pass", "cluster"], autouse=True)
def variant(kernels, request):
    """The kernel that the plan chooses, the one that runs everywhere, and rows cut into eight slices."""
    if request.param != "chosen":
        require_hopper(kernels)  # where the kernels are a GPU's
        kernels.overrides = CLUSTER if request.param == "cluster" else {"kernel": "vocab_pass"}
    yield request.param
    kernels.overrides = {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 2001, 9001])
def test_statistics(kernels, reference, dtype, vocab):
    z = logits(5, vocab, dtype)
    for tau in (0.7, 1e-3, 10.0):
        check_statistics(reference, kernels.logit_statistics(z, tau), z, tau)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_do_not_depend_on_a_shift(kernels, reference, dtype):
    """x e^x sums would lose everything at an offset of 1e4."""
    z = (torch.randint(-16, 16, (3, 513)) * 64 + (0 if dtype == torch.float16 else 2**14)).to(dtype)
    check_statistics(reference, kernels.logit_statistics(z, 50.0), z, 50.0)


def test_sums_of_equal_addends(kernels, reference):
    """A maximum for every thread, then hundreds of equal small terms, which would all round the same way."""
    vocab = 152_064
    z = torch.full((1, vocab), -8.0)
    z[0, torch.arange(0, vocab, 8)[:512]] = 1.3
    for got, truth in zip(
        kernels.logit_statistics(z, 1.0, splits=1)[:3], reference.logit_statistics(z.double(), 1.0)[:3], strict=True
    ):
        assert error(got, truth) <= 2 * EPS32 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "pad"), [(1, 0), (0, 1), (3, 5), (8, 8), (4, 12)])
def test_strided_and_unaligned_rows(kernels, reference, dtype, offset, pad):
    z = logits(4, 1003, dtype)
    keys = row_keys(4)
    got = kernels.sample_tokens(placed(z, offset, pad), keys, 0.7, top_p=0.9)
    check_statistics(reference, got, z, 0.7)
    check_draw(reference, got, z, keys, 0.7, top_p=0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels, dtype):
    z = torch.empty(0, 7, dtype=dtype)
    assert kernels.logit_statistics(z, 1.0)[0].shape == (0,)
    assert kernels.sample_tokens(z, row_keys(0), 1.0)[4].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_bad_rows(kernels, reference, dtype, splits):
    """NaN, +inf and nothing finite spoil their own row only; -inf entries are legal."""
    z = logits(10, 1500, dtype)
    z[0, 700] = math.nan
    z[1, 1499] = math.inf
    z[2] = -math.inf
    z[3, ::2] = -math.inf
    z[4] = -math.inf
    z[4, 1234] = -7.0
    z[5, 0], z[5, 1] = math.nan, math.inf
    z[6] = torch.finfo(dtype).min
    z[7, :] = -math.inf
    z[7, 3] = math.inf
    flag = torch.zeros(1, dtype=torch.int32)
    keys = row_keys(10)
    got = kernels.sample_tokens(z, keys, 0.7, top_p=0.9, error_flag=flag, splits=splits)
    check_statistics(reference, got, z, 0.7)
    check_draw(reference, got, z, keys, 0.7, top_p=0.9)
    assert got[3].tolist()[:3] == [-1, -1, -1]
    assert flag.item() == 1


@pytest.mark.parametrize("splits", [1, 4])
def test_forbidden_ids(kernels, reference, splits):
    z = logits(6, 1501, torch.bfloat16)
    forbidden = torch.zeros(1501, dtype=torch.bool)
    forbidden[z.argmax(dim=1)] = True
    forbidden[::3] = True
    z[1] = -math.inf
    z[1, 0] = 2.0  # its only finite id is forbidden
    flag = torch.zeros(1, dtype=torch.int32)
    keys = row_keys(6)
    got = kernels.sample_tokens(z, keys, 0.9, top_p=0.95, forbidden=forbidden, error_flag=flag, splits=splits)
    check_statistics(reference, got, z, 0.9)
    check_draw(reference, got, z, keys, 0.9, top_p=0.95, forbidden=forbidden)
    assert got[4][1].item() == -1
    assert got[3][1].item() == 0
    assert flag.item() == 2
    flag = torch.full((1,), 4, dtype=torch.int32)
    got = kernels.sample_tokens(z, keys, 0.9, forbidden=torch.ones_like(forbidden), error_flag=flag, splits=splits)
    assert (got[4] == -1).all()
    assert torch.isnan(torch.stack(got[5:])).all()
    assert flag.item() == 4 | 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_forbidden_mask_of_any_alignment(kernels, reference, dtype, offset):
    z = logits(3, 777, dtype)
    forbidden = placed(torch.rand(1, 777, generator=torch.Generator().manual_seed(1)).lt(0.5), offset)[0]
    keys = row_keys(3)
    got = kernels.sample_tokens(z, keys, 0.7, top_p=0.9, forbidden=forbidden)
    check_draw(reference, got, z, keys, 0.7, top_p=0.9, forbidden=forbidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 50, 5000])
def test_draws(kernels, reference, dtype, top_p, top_k):
    z = logits(8, 2001, dtype)
    keys = row_keys(8)
    for tau in (0.7, 1e-3, 10.0):
        got = kernels.sample_tokens(z, keys, tau, top_p=top_p, top_k=top_k)
        check_draw(reference, got, z, keys, tau, top_p=top_p, top_k=top_k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_the_nucleus_boundary(kernels, reference, dtype):
    """Equal logits: exactly the lowest ids up to the boundary survive, also across bins of ids."""
    vocab = 6001
    z = torch.full((4, vocab), 1.5, dtype=dtype)
    z[1, ::2] = -math.inf
    z[2] = (torch.arange(vocab) % 5).to(dtype)
    z[3, 17] = 3.0
    z[3, 100:200] = -1.0
    keys = row_keys(4)
    for top_p in (0.0, 1 / 3, 0.5, 0.999):
        for top_k in (None, 40):
            got = kernels.sample_tokens(z, keys, 1.0, top_p=top_p, top_k=top_k)
            check_draw(reference, got, z, keys, 1.0, top_p=top_p, top_k=top_k)
            # mass strictly ahead <= top_p of the total: ids 0 ... floor(top_p V)
            kept = math.floor(top_p * vocab) + 1
            assert got[7][0].item() == pytest.approx(math.log(kept), rel=1e-6)
            assert got[4][0].item() < kept


def test_both_zeros_are_one_value(kernels, reference):
    z = torch.tensor([[0.0, -0.0, -0.0, 0.0, -1.0]]).repeat(16, 1)
    keys = row_keys(16)
    for top_p in (0.0, 0.3, 0.6):
        check_draw(reference, kernels.sample_tokens(z, keys, 1.0, top_p=top_p), z, keys, 1.0, top_p=top_p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_in_dense_keys(kernels, reference, dtype):
    """Many distinct keys in one bin of the first level: nearly equal logits, and magnitudes from 1e-30 to 1."""
    generator = torch.Generator().manual_seed(3)
    near = 10 + 1e-3 * torch.randn(3, 3001, generator=generator)
    tiny = torch.randn(3, 3001, generator=generator) * 10 ** (-30 * torch.rand(3, 3001, generator=generator))
    z = torch.cat([near, tiny]).to(dtype)
    keys = row_keys(6)
    for top_p, top_k in ((0.3, None), (0.9, None), (0.9, 100), (1.0, 2999)):
        got = kernels.sample_tokens(z, keys, 1.0, top_p=top_p, top_k=top_k)
        # Masses are good to 1e-7 here as anywhere: the boundary may differ from the exact one by an id.
        truth = reference.sample_tokens(z.double(), keys, 1.0, top_p=top_p, top_k=top_k)
        kept, expected = got[7].double().exp(), truth.filtered_entropy.exp()
        assert ((kept - expected).abs() <= 1e-5 * expected + (1 if top_p < 1 else 0)).all()
        if top_p == 1.0:
            assert torch.equal(got[4], truth.token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_do_not_depend_on_splits_or_row_order(kernels, dtype):
    z = logits(6, 2501, dtype)
    keys = row_keys(6)
    whole = kernels.sample_tokens(z, keys, 0.7, top_p=0.95, top_k=60, splits=1)
    again = kernels.sample_tokens(z, keys, 0.7, top_p=0.95, top_k=60, splits=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for splits in (2, 7, 300):
        parts = kernels.sample_tokens(z, keys, 0.7, top_p=0.95, top_k=60, splits=splits)
        assert kernels.plan["splits"] > 1 or kernels.overrides == CLUSTER
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], parts[3:], strict=True))
        repeated = kernels.sample_tokens(z, keys, 0.7, top_p=0.95, top_k=60, splits=splits)
        assert all(torch.equal(a, b) for a, b in zip(parts, repeated, strict=True))
    order = torch.randperm(6)
    moved = kernels.sample_tokens(z[order].contiguous(), keys[order].contiguous(), 0.7, top_p=0.95, top_k=60, splits=1)
    # An odd row length moves the rows' alignment, and with it which elements a thread adds up first.
    assert torch.equal(whole[3][order], moved[3])
    assert torch.equal(whole[4][order], moved[4])
    for a, b in zip(whole, moved, strict=True):
        assert ((a[order] - b).abs() <= 1e-6 * b.abs().clamp_min(1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 5, 500])
def test_split_statistics(kernels, reference, dtype, splits):
    z = logits(3, 4003, dtype)
    check_statistics(reference, kernels.logit_statistics(z, 0.7, splits=splits), z, 0.7)


@pytest.mark.grid(only=lambda p: p["variant"] == "cluster")  # compares all kernels at once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.5, "top_k": 300}, {}])
def test_draws_do_not_depend_on_the_kernel(kernels, dtype, options):
    """Integer sums and maxima with one winner: bit for bit the same from any cluster, and from vocab_pass."""
    z, keys = logits(4, 5003, dtype), row_keys(4)
    forbidden = torch.rand(5003, generator=torch.Generator().manual_seed(1)).lt(0.1)
    for tau in (0.4, 5.0):
        draws = [
            sampled(kernels, z, keys, tau, overrides, forbidden=forbidden, **options)[3:]
            for overrides in ({"kernel": "vocab_pass"}, *(CLUSTER | {"cluster_n": size} for size in (1, 2, 4, 8)))
        ]
        for other in draws[1:]:
            assert all(torch.equal(a, b) for a, b in zip(draws[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 129])
def test_rows_shorter_than_a_cluster(kernels, reference, dtype, vocab):
    """CTAs without ids, and slices that end anywhere in a row of any alignment."""
    z, keys = logits(9, vocab, dtype), row_keys(9)
    got = kernels.sample_tokens(placed(z, 3, 1), keys, 0.7, top_p=0.8, top_k=3)
    check_statistics(reference, got, z, 0.7)
    check_draw(reference, got, z, keys, 0.7, top_p=0.8, top_k=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_matters_lies_in_one_slice(kernels, reference, dtype):
    """Maximum, bad values, ties and the only allowed ids at every boundary between eight slices."""
    vocab = 8 * 64
    places = [0, 63, 64, 127, 128, 255, 256, 448, 511]
    z = logits(4 * len(places), vocab, dtype).clamp(max=4)
    for i, place in enumerate(places):
        z[4 * i, place] = 9.0
        z[4 * i + 1, place] = (math.nan, math.inf)[i % 2]
        z[4 * i + 2, :] = -math.inf
        z[4 * i + 2, place] = 1.0
        z[4 * i + 3, place:] = 8.0  # ties with all that follow
    keys = row_keys(len(z))
    flag = torch.zeros(1, dtype=torch.int32)
    got = kernels.sample_tokens(z, keys, 0.7, top_p=0.6, error_flag=flag)
    check_statistics(reference, got, z, 0.7)
    check_draw(reference, got, z, keys, 0.7, top_p=0.6)
    assert got[3][0::4].tolist() == places
    assert (got[3][1::4] == -1).all()
    assert got[4][2::4].tolist() == places
    assert got[3][3::4].tolist() == places
    assert flag.item() == 1
    for place in places:
        forbidden = torch.ones(vocab, dtype=torch.bool)
        forbidden[place] = False
        finite = z[0::4]
        got = kernels.sample_tokens(finite, keys[0::4].contiguous(), 0.7, top_p=0.6, forbidden=forbidden)
        check_statistics(reference, got, finite, 0.7)
        assert (got[4] == place).all()
        assert (got[5] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_between_two_ids(kernels, dtype):
    """top_p times the mass is exactly what lies ahead of an id: it is kept, and fp32 sums cannot tell."""
    for vocab, top_p in ((512, 0.5), (1000, 0.25), (1024, 0.125)):
        z = torch.full((2, vocab), 2.5, dtype=dtype)
        got = kernels.sample_tokens(z, row_keys(2), 1.0, top_p=top_p)
        assert got[7].exp() == pytest.approx(int(top_p * vocab) + 1, rel=1e-5)
        forbidden = torch.arange(vocab) % 2 == 0
        got = kernels.sample_tokens(z, row_keys(2), 1.0, top_p=top_p, forbidden=forbidden)
        assert got[7].exp() == pytest.approx(int(top_p * vocab / 2) + 1, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guesses_that_miss(kernels, reference, dtype):
    """Mass that no sample of threads sees, more candidates than fit, and flat rows."""
    vocab = 4096
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(5, vocab, generator=generator) - 20
    z[0, 8::32] = 3.0  # one thread in four
    z[1, 1024:3072] = 5.0  # all of some slices
    z[2] = torch.randn(vocab, generator=generator) * 0.01
    z[3, :2000] = torch.randn(2000, generator=generator)
    z[4, 4000:] = torch.randn(96, generator=generator) * 3
    z, keys = z.to(dtype), row_keys(5)
    for top_p, top_k in ((0.97, None), (0.5, None), (1.0, 1500), (0.9, 40)):
        got = kernels.sample_tokens(z, keys, 1.0, top_p=top_p, top_k=top_k)
        truth = reference.sample_tokens(z.double(), keys, 1.0, top_p=top_p, top_k=top_k)
        kept, expected = got[7].double().exp(), truth.filtered_entropy.exp()
        assert ((kept - expected).abs() <= 1e-5 * expected + (1 if top_p < 1 else 0)).all()


@pytest.mark.grid(only=lambda p: p["variant"] == "cluster")
def test_all_slices_decide_alike(kernels, reference):
    """The nucleus ends within the bounds of the fp32 sum, and the last slice is shorter than the others.

    One CTA that judged by its own length would leave the others alone in the search.
    """
    vocab = 513 * 8
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(1, vocab, generator=generator) * 0.5 - 25.5).to(torch.bfloat16)
    z[0, 8] = 0.0
    peak = 2.0**40 / (z.double().exp() * 2.0**40).round().sum().item()
    keys = row_keys(1)
    for step in range(28, 41):
        top_p = peak / (1 + step * 2.0**-24)
        got = sampled(kernels, z, keys, 1.0, CLUSTER | {"cluster_n": 2}, top_p=top_p)
        truth = reference.sample_tokens(z.double(), keys, 1.0, top_p=top_p)
        assert torch.equal(got[4], truth.token)
        assert error(got[7], truth.filtered_entropy) <= 1e-6


def test_masks_of_any_true_byte(kernels, reference):
    """A bool made of other memory holds any byte that is not 0."""
    z = logits(2, 640, torch.bfloat16)
    marks = torch.zeros(640, dtype=torch.uint8)
    marks[z[0].float().argsort(descending=True)[:20]] = 255
    marks[5], marks[639] = 2, 128
    keys = row_keys(2)
    got = kernels.sample_tokens(z, keys, 1.0, top_p=0.3, forbidden=marks.view(torch.bool))
    check_draw(reference, got, z, keys, 1.0, top_p=0.3, forbidden=marks != 0)


def test_statistics_of_both_operators_agree(kernels):
    z = logits(3, 3001, torch.bfloat16)
    statistics = kernels.logit_statistics(z, 0.7)
    for options in ({}, {"top_p": 0.9}):
        draws = kernels.sample_tokens(z, row_keys(3), 0.7, **options)
        assert all(torch.equal(a, b) for a, b in zip(statistics, draws[:4], strict=True))


@pytest.mark.grid(only=lambda p: p["variant"] == "chosen")
def test_clusters_by_length(hopper):
    """Just below and above the lengths at which the plan takes a larger cluster."""
    require_hopper(hopper)
    for vocab, size in ((19_193, 1), (19_194, 2), (38_393, 2), (38_394, 4), (76_793, 4), (76_794, 8)):
        z = logits(1, vocab, torch.bfloat16)
        z[0, vocab - 1] = 30.0
        got = hopper.sample_tokens(z, row_keys(1), 0.7, top_p=0.9)
        assert (hopper.plan["kernel"], hopper.plan["cluster"][1]) == ("vocab_pass_sm90", size)
        assert got[3].item() == got[4].item() == vocab - 1


def test_overrides_that_cannot_be(kernels):
    z = logits(1, 100, torch.float32)
    with pytest.raises(RuntimeError, match=r"kernel must be .*vocab_pass, got commit"):
        sampled(kernels, z, row_keys(1), 1.0, {"kernel": "commit"})
    with pytest.raises(RuntimeError, match=r"cluster_n must be 1"):
        sampled(kernels, z, row_keys(1), 1.0, {"kernel": "vocab_pass", "cluster_n": 2})
