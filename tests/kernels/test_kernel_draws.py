"""Draws of the vocabulary pass: forbidden ids as a list, what the filter costs, and noise that is not computed."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from support.build_simulated import ROOT, SOURCES, Unavailable, find_nvcc, simulator_command
from support.cases import DTYPES, row_keys
from support.draws import check_draw, check_statistics, logits, require_hopper, sampled

sys.path.insert(0, str(ROOT / "benchmarks"))
from simulated_traffic import counting

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.grid(
        strength=2, only=lambda p: p.get("overrides", "chosen") == "chosen" or p["kernels"] == "compute_90a"
    ),
]
VARIANTS = {
    "chosen": {},
    "vocab_pass": {"kernel": "vocab_pass"},
    "parts": {"kernel": "vocab_pass", "splits": 3},
    **{f"cluster of {n}": {"kernel": "vocab_pass_sm90", "cluster_n": n} for n in (1, 2, 8)},
}


@pytest.fixture(params=VARIANTS)
def overrides(kernels, request):
    if request.param != "chosen":
        require_hopper(kernels)  # where the kernels are a GPU's
    return {"splits": 0} | VARIANTS[request.param]


def as_mask(ids, vocab):
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[ids[(ids >= 0) & (ids < vocab)].long()] = True
    return mask


def same(a, b):
    return all(torch.equal(x, y) or (torch.isnan(x) & torch.isnan(y)).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.5, "top_k": 300}, {}])
def test_a_list_forbids_what_the_flags_do(kernels, reference, overrides, dtype, options):
    """In any order, named twice, or of another vocabulary."""
    vocab = 5003
    z, keys = logits(4, vocab, dtype), row_keys(4)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocab, (300,), generator=generator, dtype=torch.int32)
    ids = torch.cat([ids, ids[:100], torch.tensor([-1, vocab, 2**31 - 1, -(2**31)], dtype=torch.int32)])
    mask = as_mask(ids, vocab)
    listed = sampled(kernels, z, keys, 0.7, overrides, forbidden_ids=ids, **options)
    flagged = sampled(kernels, z, keys, 0.7, overrides, forbidden=mask, **options)
    assert same(listed, flagged)
    check_statistics(reference, listed, z, 0.7)
    check_draw(reference, listed, z, keys, 0.7, forbidden=mask, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_list_takes_what_matters(kernels, reference, overrides, dtype):
    """The maximum; most of the mass but not the maximum; ids beyond those that are loaded ahead; everything."""
    vocab = 4001
    z, keys = logits(3, vocab, dtype), row_keys(3)
    z[:, 17] = 15.0
    z[:, 1000:1040] = 14.5
    lists = [[17], list(range(1000, 1040)), [17, *range(1000, 1040)], list(range(0, vocab, 4)) * 3]
    for taken in lists:
        ids = torch.tensor(taken, dtype=torch.int32)
        for options in ({"top_p": 0.9}, {"top_k": 30}):
            got = sampled(kernels, z, keys, 0.7, overrides, forbidden_ids=ids, **options)
            check_statistics(reference, got, z, 0.7)
            check_draw(reference, got, z, keys, 0.7, forbidden=as_mask(ids, vocab), **options)
    flag = torch.zeros(1, dtype=torch.int32)
    ids = torch.randperm(vocab, dtype=torch.int32)
    got = sampled(kernels, z, keys, 0.7, overrides, forbidden_ids=ids, top_p=0.9, error_flag=flag)
    check_statistics(reference, got, z, 0.7)
    assert (got[4] == -1).all()
    assert flag.item() == 2


def test_flags_and_a_list_exclude_each_other(kernels):
    z, ids = torch.zeros(1, 100), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        kernels.sample_tokens(z, row_keys(1), 1.0, forbidden=torch.zeros(100, dtype=torch.bool), forbidden_ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 8.0])
def test_noise_left_out_changes_no_draw(kernels, overrides, dtype, scale):
    """The token is the argmax of score + noise with all noise computed, ties to the lowest id."""
    n, vocab, tau = 24, 1501, 0.7
    z, keys = logits(n, vocab, dtype, scale), row_keys(n)
    z[::2, ::3] = -float("inf")
    noise = kernels.gumbel_perturb(torch.zeros(n, vocab), keys, 1.0)
    perturbed = (z.float() - z.float().amax(dim=1, keepdim=True)) / torch.tensor(tau) + noise
    got = sampled(kernels, z, keys, tau, overrides)
    assert torch.equal(got[4], perturbed.argmax(dim=1))


BOUND = r"""
#include <cstdio>

#include "kernels/detail/philox.cuh"

// Uniforms of every magnitude: some ends and some random bits behind each leading one, and what lies beside.
__global__ void compare(float* largest_excess, float* largest_gap) {
  const int leading = blockIdx.x;
  uint64_t random = 0x9E3779B97F4A7C15ull * (blockIdx.x * blockDim.x + threadIdx.x + 1);
  random ^= random >> 29;
  const uint64_t rest[] = {0, 1, ~0ull, 1ull << 63, ~0ull >> 1, 0xffffffffull, random, random * random};
  float excess = -1e30f, gap = 0.f;
  for (const uint64_t bits : rest) {
    const uint64_t first = leading < 64 ? 1ull << (63 - leading) : 0;
    const uint64_t x = first | (leading < 64 ? (bits & (first - 1)) : 0);
    const float noise = entrgi::gumbel(x), bound = entrgi::gumbel_bound(x);
    excess = fmaxf(excess, noise - bound);
    if (x >> 32 > 1ull << 20 && noise > 3) gap = fmaxf(gap, bound - noise);
  }
  largest_excess[blockIdx.x * blockDim.x + threadIdx.x] = excess;
  largest_gap[blockIdx.x * blockDim.x + threadIdx.x] = gap;
}

int main() {
  float *excess, *gap;
  cudaMallocManaged(&excess, 65 * 64 * sizeof(float));
  cudaMallocManaged(&gap, 65 * 64 * sizeof(float));
  compare<<<65, 64>>>(excess, gap);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;
  float largest[2] = {-1e30f, 0};
  for (int i = 0; i < 65 * 64; ++i) {
    largest[0] = fmaxf(largest[0], excess[i]);
    largest[1] = fmaxf(largest[1], gap[i]);
  }
  std::printf("[%g, %g]\n", largest[0], largest[1]);
}
"""


def test_the_bound_of_the_noise(tmp_path):
    """Never below the noise that is computed, and near it where noise is large."""
    try:
        nvcc, (command, environment) = find_nvcc(), simulator_command()
    except Unavailable as reason:
        pytest.skip(str(reason))
    (tmp_path / "bound.cu").write_text(BOUND)
    flags = ["-O3", "-std=c++20", "--no-compress", "-cudart", "shared", f"-I{SOURCES}"]
    flags += ["-gencode", "arch=compute_80,code=compute_80"]
    subprocess.run([nvcc, *flags, tmp_path / "bound.cu", "-o", tmp_path / "bound"], check=True)
    run = subprocess.run([*command, tmp_path / "bound"], env=environment, capture_output=True, text=True, check=True)
    excess, gap = json.loads(run.stdout)
    assert excess <= -2e-5
    assert gap <= 0.1


# ---- what a draw costs, counted ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator():
    torch.set_num_threads(1)
    try:
        simulator = counting.Simulator("compute_90a")
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    yield simulator
    simulator.close()


def count(simulator, z, tau=0.7, seed=0, **options):
    """Results, warp instructions times 32 per id, and bytes asked of device memory."""
    before = len(simulator.statistics.read_text().splitlines())
    keys = row_keys(len(z)) + seed
    got = simulator.kernels.sample_tokens(z, keys, tau, **options)
    launches = [json.loads(line) for line in simulator.statistics.read_text().splitlines()[before:]]
    instructions = 32 * sum(sum(one["warp_inst"].values()) for one in launches) / z.numel()
    requested = sum(one["global_load_bytes"] + one["tma_load_bytes"] for one in launches)
    return got, instructions, requested


def normal(n, vocab, scale, seed=0):
    return (torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(torch.bfloat16)


def peaked(n, vocab):
    z = normal(n, vocab, 2.0) - 4
    z[torch.arange(n), torch.arange(n) * 1001 + 5] = 20.0
    return z


@pytest.mark.parametrize("make", [peaked, lambda n, vocab: normal(n, vocab, 3.0)], ids=["peaked", "N(0, 3)"])
def test_a_list_of_forbidden_ids_costs_little(simulator, make):
    """400 ids of 152,064, as of a tokenizer: at most 5 % of a draw, in instructions and in bytes."""
    vocab = 152_064
    z = make(2, vocab)
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:400].to(torch.int32)
    _, instructions, requested = count(simulator, z, top_p=0.95)
    _, with_list, requested_with_list = count(simulator, z, top_p=0.95, forbidden_ids=ids)
    assert with_list <= 1.05 * instructions
    assert requested_with_list <= 1.05 * requested


def test_no_cliff_between_small_and_large_nuclei(simulator):
    """From 100 to 20,000 ids, instructions grow with the nucleus, and not twofold over all of it."""
    vocab, counts = 152_064, []
    for scale in (3.8, 3.4, 3.0, 2.75, 2.5, 2.25, 2.0, 1.95):
        z = normal(1, vocab, scale, seed=5)
        p = torch.softmax(z[0].float() / 0.7, 0).sort(descending=True).values
        counts.append((int((p.cumsum(0) - p <= 0.95).sum()), count(simulator, z, top_p=0.95)[1]))
    assert counts[0][0] < 200, counts
    assert counts[-1][0] > 20_000, counts
    assert all(b[1] <= 1.3 * a[1] for a, b in itertools.pairwise(counts)), counts
    assert counts[-1][1] <= 2 * counts[0][1], counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [1, 3, 60, 200])
@pytest.mark.parametrize("options", [{"top_p": 0.4}, {"top_k": 3000}, {"top_p": 0.4, "top_k": 9000}])
def test_few_keys_are_counted(hopper, reference, dtype, levels, options):
    """Thousands of candidates of few values: limits within a key's ids, few and many, in one CTA and in all."""
    require_hopper(hopper)
    vocab = 20_011
    generator = torch.Generator().manual_seed(levels)
    z = torch.randint(0, levels, (3, vocab), generator=generator).to(dtype) / 32 + 4
    z[1] = -z[1]
    z[2, ::3] = -float("inf")
    keys = row_keys(3)
    by_mass = sampled(hopper, z, keys, 0.7, {"kernel": "vocab_pass"}, **options)
    for clusters in (1, 4):
        overrides = {"splits": 0, "kernel": "vocab_pass_sm90", "cluster_n": clusters}
        got = sampled(hopper, z, keys, 0.7, overrides, **options)
        check_draw(reference, got, z, keys, 0.7, **options)
        assert same(got[4:], by_mass[4:])  # to the bit, as no tolerance would show one id more or less


@pytest.mark.parametrize("forbidden", [0, 30])
@pytest.mark.parametrize("distance", [3e-7, -3e-7, 1e-10, -1e-10])
def test_a_limit_is_known_to_two_roundings(simulator, distance, forbidden):
    """An id 3e-7 of the mass from the limit is decided at once; at 1e-10 the row is read again, and rightly."""
    vocab = 40_000
    z = normal(1, vocab, 3.0, seed=3)
    top = z[0].float().max()
    scale = torch.tensor(1.4426950408889634 / 0.7, dtype=torch.float32)
    mass = (torch.exp2((z[0].float() - top) * scale).double() * 2**40).round()
    order = z[0].float().sort(descending=True, stable=True).indices
    taken = order[100 : 100 + forbidden]
    mass[taken] = 0
    order = torch.cat([order[:100], order[100 + forbidden :]])
    ahead = mass[order].cumsum(0)
    kept = 200
    options = {"forbidden_ids": taken.to(torch.int32)} if forbidden else {}
    got, _, requested = count(simulator, z, top_p=(ahead[kept - 1] / ahead[-1]).item() + distance, **options)
    # Ids whose mass ahead is at most the limit: one more on its upper side.
    lower, upper = (mass[order[: kept + more]] for more in (0, 1))
    p = (upper if distance > 0 else lower) / (upper if distance > 0 else lower).sum()
    assert got[7].item() == pytest.approx(-(p * p.log()).sum().item(), abs=2e-6)
    again = requested > 1.5 * z.numel() * 2
    assert again == (abs(distance) < 1e-7)
