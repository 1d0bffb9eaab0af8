// Vocabulary pass on Hopper: one read of z from device memory, with or without a draw. Formulas, layouts and
// results are those of vocab_pass.cu.
//
// Floor    N V sizeof(z) bytes. Two exponentials an element (one at tau = 1): at 16 ex2 per clock and SM they
//          take 8 elements per clock, in which a bf16 row needs 88 % of an H200's memory bandwidth.
//
// Tiling   one row per cluster of C CTAs of 256 threads, a slice of it in the shared memory of each
//
// clang-format off
//   z row  |  CTA 0  |  CTA 1  |   ...   | CTA C-1 |     up to 40 KB each: four CTAs to an SM, so that the
//           chunk 0..3                                   copies of one row run under the arithmetic of others
//
//   1  chunks land by bulk copies (detail/row_slice.cuh); packed maximum of what is there    -> maximum of row
//   2  both exponentials with the final maximum, sums; forbidden ids become -inf             -> statistics
//   3  a threshold is guessed, ids above it are listed and checked to be all that count      -> candidates
//   4  one CTA finds the exact thresholds among them and draws (detail/cluster_draw.cuh)     -> token
// clang-format on
//
// Each arrow is one exchange over distributed shared memory (detail/cluster.cuh). Where a guess fails or too
// many ids survive, the cluster searches its slices together by histograms (detail/threshold_search.cuh).
//
// Considered, see docs/kernels/vocab_pass.md: online sums (a rescaling branch, two more exponentials per
// thread and merge); exact integer masses of all ids (five instructions each, a third of a draw); clamping
// -inf in the sweep (one more); larger slices with one or two CTAs on an SM; polynomials for some
// exponentials.
#include "detail/cluster_draw.cuh"
#include "launch.h"
#include "vocab_pass.cuh"

namespace entrgi {
namespace {

constexpr int kBlocksPerSm = 4;

template <typename T, bool kDraw>
__global__ void __launch_bounds__(kClusterThreads, kBlocksPerSm)
    vocab_pass_sm90_kernel(const __grid_constant__ SampleTokensParams p,
                           const __grid_constant__ Scales scales, int cluster_size, uint32_t room) {
#ifdef ENTRGI_CLUSTERS
  extern __shared__ uint4 memory[];
  __shared__ std::conditional_t<kDraw, DrawShared, ClusterShared> shared;
  const int64_t n = blockIdx.x / cluster_size;
  const int vocab = static_cast<int>(p.vocab);
  Cluster cluster{shared.mailbox, cluster_size, static_cast<int>(blockIdx.x) % cluster_size};

  Barrier* landed = reinterpret_cast<Barrier*>(shared.landed);
  const T* logits = static_cast<const T*>(p.logits) + n * p.logits_stride;
  const RowSlice<T> slice = begin_slice<T>(logits, vocab, cluster.rank, cluster.size, memory, landed);
  if constexpr (kDraw) {
    if (threadIdx.x == 0) shared.listed = shared.pooled = 0;
  }
  cluster.sync();

  float thread_max = Packed<T>::largest_or_nan(largest_as_it_lands(slice, landed));
  const Largest largest =
      cluster.exchange(0, Largest{__reduce_max_sync(~0u, max_key(thread_max))}, Largest{0});
  const uint32_t row_key = __reduce_max_sync(~0u, largest.key);
  const bool writes = cluster.rank == 0 && threadIdx.x == 0;
  if (!is_finite_key(row_key)) {
    if (writes) {
      refuse_statistics(p, n);
      if constexpr (kDraw) refuse_draw(p, n, 1);
    }
    return;
  }

  const float row_max = from_ordered_key<float>(row_key);
  Sums mine = add_up(slice, row_max, scales);
  mine.argmax = thread_max == row_max ? first_id_of(slice, row_max) : UINT32_MAX;
  float thread_mass = mine.sum_tau;
  if constexpr (kDraw) {
    if (p.forbidden != nullptr && mask(slice, p.forbidden, vocab)) {
      thread_max = Packed<T>::largest_or_nan(largest_of(slice));
      thread_mass = add_up_again(slice, row_max, scales.scale);
    }
    mine.allowed = thread_mass;
    mine.allowed_key = max_key(thread_max);
    gather_allowed(mine);
  }
  gather_statistics(mine);
  Sums sums = cluster.exchange(1, mine, Sums{.argmax = UINT32_MAX});
  if (cluster.rank == 0 && threadIdx.x < 32) {
    gather_statistics(sums);
    if (threadIdx.x == 0) {
      write_statistics(p, scales, n, row_max, sums.sum, sums.weighted, sums.sum_tau, sums.weighted_tau,
                       static_cast<int>(sums.argmax));
    }
  }
  if constexpr (kDraw) {
    gather_allowed(sums);
    if (!is_finite_key(sums.allowed_key)) {
      if (writes) refuse_draw(p, n, 2);
      return;
    }
    const float allowed_max = from_ordered_key<float>(sums.allowed_key);
    if (allowed_max != row_max) {
      thread_mass = add_up_again(slice, allowed_max, scales.scale);
      const Sums again = cluster.exchange(0, Sums{.allowed = sum_across_warp(thread_mass)}, Sums{});
      sums.allowed = sum_across_warp(again.allowed);
      cluster.sync();  // the same slots come next
    }
    draw<T>(p, scales, n, slice, allowed_max, thread_max, thread_mass, sums.allowed, cluster, shared, room);
  }
#endif
}

}  // namespace

template <bool kDraw>
cudaError_t vocab_pass_sm90(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.threads != kClusterThreads || plan.cluster_n < 1 || plan.cluster_n > kMaxCluster ||
      plan.grid != p.n * plan.cluster_n || plan.shared_bytes > kMaxSliceBytes || p.vocab < 1) {
    return cudaErrorInvalidValue;
  }
  if (p.n == 0) return cudaSuccess;
  const LaunchConfig config{plan.grid, kClusterThreads, plan.shared_bytes, plan.cluster_n};
  return with_type(p.logits_dtype, [&]<typename T>() {
    return launch_kernel<vocab_pass_sm90_kernel<T, kDraw>, kMaxSliceBytes>(
        config, stream, p, Scales(p.temperature), plan.cluster_n,
        static_cast<uint32_t>(plan.shared_bytes / sizeof(Candidate)));
  });
}

template cudaError_t vocab_pass_sm90<false>(const SampleTokensParams&, const Plan&, cudaStream_t);
template cudaError_t vocab_pass_sm90<true>(const SampleTokensParams&, const Plan&, cudaStream_t);

}  // namespace entrgi
