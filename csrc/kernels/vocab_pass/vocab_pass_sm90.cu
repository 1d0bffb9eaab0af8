// Vocabulary pass on Hopper: one read of z from device memory, with or without a draw. Formulas, layouts and
// results are those of vocab_pass.cu.
//
// Floor    N V sizeof(z) bytes. Two exponentials an element (one at tau = 1): at 16 ex2 per clock and SM they
//          take 8 elements per clock, in which a bf16 row needs 88 % of an H200's memory bandwidth
//          (assumed: its data sheet).
//
// Tiling   one row per cluster of C CTAs of 256 threads, a slice of it in the shared memory of each
//
//   z row  |  CTA 0  |  CTA 1  |   ...   | CTA C-1 |     up to 37.5 KB each: four CTAs to an SM, so that the
//           chunk 0..3                                   copies of one row run under the arithmetic of others
//
//   1  chunks land by bulk copies (row_slice.cuh); packed maximum of what is there          -> maximum of row
//   2  both exponentials with the final maximum, sums; forbidden ids become -inf            -> statistics
//   3  a threshold is guessed, ids above it are listed and checked to be all that count     -> candidates
//   4  few: one CTA finds the exact thresholds among them and draws; many: all CTAs do      -> token
//
// Each arrow is one exchange over distributed shared memory (cluster.cuh); 3 and 4 are in
// cluster_draw.cuh. Where a guess fails, the cluster searches all ids together
// (threshold_search.cuh).
//
// Considered, see docs/kernels/vocab_pass.md: online sums (a rescaling branch, two more exponentials per
// thread and merge); exact integer masses of all ids (five instructions each, a third of a draw); clamping
// -inf in the sweep (one more); larger slices with one or two CTAs on an SM; polynomials for some
// exponentials.
#include "../detail/launch.h"
#include "cluster_draw.cuh"
#include "vocab_pass.cuh"

namespace entrgi {
namespace {

template <typename T, bool kDraw>
__global__ void __launch_bounds__(kClusterThreads, kCtasPerSm)
    vocab_pass_sm90_kernel(const __grid_constant__ SampleTokensParams p,
                           const __grid_constant__ Scales scales, int cluster_size, uint32_t room) {
#ifdef ENTRGI_CLUSTERS
  extern __shared__ uint4 memory[];
  __shared__ std::conditional_t<kDraw, DrawShared, ClusterShared> shared;
  static_assert(sizeof(shared) <= kSearchBytes, "the plan leaves room for the search beside four slices");
  const int64_t n = blockIdx.x / cluster_size;
  const int vocab = static_cast<int>(p.vocab);
  Cluster cluster{shared.mailbox, cluster_size, static_cast<int>(blockIdx.x) % cluster_size};

  Barrier* landed = reinterpret_cast<Barrier*>(shared.landed);
  const T* logits = static_cast<const T*>(p.logits.data) + n * p.logits.stride;
  const RowSlice<T> slice = begin_slice<T>(logits, vocab, cluster.rank, cluster.size, memory, landed);
  if constexpr (kDraw) begin_draw<T>(p, n, shared);
  cluster.sync();
  if constexpr (kDraw) hold_forbidden(slice, p, shared);

  const float thread_max = Packed<T>::largest_or_nan(largest_as_it_lands(slice, landed));
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

  float max = from_ordered_key<float>(row_key);
  const ThreadSums own = add_up(slice, max, scales);
  Sums mine{to_mass(own.sum_tau), 0, own.sum, own.weighted, own.weighted_tau, UINT32_MAX, 0};
  if (thread_max == max) mine.argmax = first_id_of(slice, max);
  const bool some_forbidden = kDraw && (p.forbidden != nullptr || p.num_forbidden > 0);
  if constexpr (kDraw) {
    if (some_forbidden) {
      __syncthreads();
      forbid(slice, p, {max, scales.scale, scales.bins_per_logit}, shared, mine);
      if (__any_sync(~0u, mine.forbidden != 0)) gather_forbidden(mine);
    }
  }
  mine.mass = sum_across_warp(mine.mass);
  gather_statistics(mine);
  Sums sums = cluster.exchange(1, mine, Sums{.argmax = UINT32_MAX});
  if (kDraw || (cluster.rank == 0 && threadIdx.x < 32)) sums.mass = sum_across_warp(sums.mass);
  if (cluster.rank == 0 && threadIdx.x < 32) {
    gather_statistics(sums);
    if (threadIdx.x == 0) {
      write_statistics(p, scales, n, max, sums.sum, sums.weighted, __ull2float_rn(sums.mass) / kMassUnit,
                       sums.weighted_tau, static_cast<int>(sums.argmax));
    }
  }
  if constexpr (kDraw) {
    bool again = false;
    if (some_forbidden) {
      gather_forbidden(sums);
      // What is left has another maximum, or so little mass that the error of all of it would weigh.
      again = sums.lost_argmax != 0 || sums.forbidden > sums.mass / 2;
    }
    if (again) {
      const float left = Packed<T>::largest_or_nan(largest_of(slice));
      const Largest allowed = cluster.exchange(0, Largest{__reduce_max_sync(~0u, max_key(left))}, Largest{0});
      const uint32_t key = __reduce_max_sync(~0u, allowed.key);
      if (!is_finite_key(key)) {
        if (writes) refuse_draw(p, n, 2);
        return;
      }
      max = from_ordered_key<float>(key);
      sums = cluster.exchange(1, Sums{.mass = sum_across_warp(mass_again(slice, max, scales.scale))}, Sums{});
      sums.mass = sum_across_warp(sums.mass);
    }
    draw<T>(p, scales, slice, max, thread_max, sums, !again, cluster, shared, room);
  }
#endif
}

}  // namespace

template <bool kDraw>
cudaError_t vocab_pass_sm90(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.cluster_n < 1 || plan.cluster_n > kMaxCluster || p.vocab < 1) return cudaErrorInvalidValue;
  if (p.n == 0) return cudaSuccess;
  const LaunchConfig config{plan.grid, kClusterThreads, plan.shared_bytes, plan.cluster_n};
  const auto kernel =
      choose([&]<typename T>() { return &compiled<vocab_pass_sm90_kernel<T, kDraw>, kMaxSliceBytes>; },
             any_type(p.logits.dtype));
  return launch(kernel, config, stream, p, Scales(p.temperature), plan.cluster_n,
                static_cast<uint32_t>(plan.shared_bytes / sizeof(Candidate)));
}

template cudaError_t vocab_pass_sm90<false>(const SampleTokensParams&, const Plan&, cudaStream_t);
template cudaError_t vocab_pass_sm90<true>(const SampleTokensParams&, const Plan&, cudaStream_t);

}  // namespace entrgi
