// What a read of part of a row leaves behind: maximum, sums and weighted sums at both temperatures. States of
// parts merge in any grouping; a fixed one makes results reproducible.
//
//   sum      = sum e^(z - max)             weighted          = sum (z - max) e^(z - max)
//   sum_tau  = sum e^((z - max) / tau)     weighted_tau      = sum (z - max) e^((z - max) / tau)
//
// The weighted sums hold (z - max), never z: H = log(sum) - weighted / sum then cancels nothing when logits
// share a large offset.
#pragma once

#include <math_constants.h>

#include "../detail/numeric.cuh"
#include "row_vectors.cuh"

namespace entrgi {

struct SoftmaxState {
  float max, sum, weighted, sum_tau, weighted_tau;
  float allowed_max;  // over the ids that may be drawn
  int argmax;         // first id of the maximum
  int bad;            // NaN or +inf was seen
};

__device__ __forceinline__ SoftmaxState empty_state() {
  return {-CUDART_INF_F, 0.f, 0.f, 0.f, 0.f, -CUDART_INF_F, -1, 0};
}

// Moves the sums to a maximum that is not smaller. `scale` is log2(e) / tau.
__device__ __forceinline__ void rescale(SoftmaxState& s, float max, float scale) {
  const float d = shifted(s.max, max);
  const float factor = exp2_approx(d * kLog2e), factor_tau = exp2_approx(d * scale);
  s.weighted = (s.weighted + d * s.sum) * factor;
  s.sum *= factor;
  s.weighted_tau = (s.weighted_tau + d * s.sum_tau) * factor_tau;
  s.sum_tau *= factor_tau;
  s.max = max;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// kTempered: tau is not 1, and a second exponential is needed.
template <bool kTempered>
__device__ __forceinline__ void absorb(SoftmaxState& s, const float (&z)[kVector], int first_id,
                                       float scale) {
  float largest = z[0];
#pragma unroll
  for (int i = 1; i < kVector; ++i) largest = max_or_nan(largest, z[i]);
  s.bad |= !(largest < CUDART_INF_F);
  if (largest > s.max) {
    rescale(s, largest, scale);
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) {
      if (z[i] == largest) s.argmax = first_id + i;
    }
  }
  // Eight are added up on their own first: thousands of equal small terms that join a large one in turn would
  // all round the same way.
  float sum = 0.f, weighted = 0.f, sum_tau = 0.f, weighted_tau = 0.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float d = shifted(z[i], s.max);
    const float e = exp2_approx(d * kLog2e);
    sum += e;
    weighted += d * e;
    if (kTempered) {
      const float e_tau = exp2_approx(d * scale);
      sum_tau += e_tau;
      weighted_tau += d * e_tau;
    }
  }
  s.sum += sum;
  s.weighted += weighted;
  s.sum_tau += kTempered ? sum_tau : sum;
  s.weighted_tau += kTempered ? weighted_tau : weighted;
}

// The merge over a warp, in every lane: the maximum first, so that each state is rescaled once, not at every
// level of the tree.
__device__ __forceinline__ SoftmaxState merge_across_warp(SoftmaxState s, float scale) {
  const auto reduce = [](float x, auto op) {
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) x = op(x, __shfl_xor_sync(~0u, x, delta));
    return x;
  };
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  const float max = reduce(s.max, larger);
  s.argmax =
      static_cast<int>(__reduce_min_sync(~0u, s.max == max ? static_cast<uint32_t>(s.argmax) : UINT32_MAX));
  rescale(s, max, scale);
  s.sum = reduce(s.sum, sum);
  s.weighted = reduce(s.weighted, sum);
  s.sum_tau = reduce(s.sum_tau, sum);
  s.weighted_tau = reduce(s.weighted_tau, sum);
  s.allowed_max = reduce(s.allowed_max, larger);
  s.bad = __any_sync(~0u, s.bad);
  return s;
}

// The merge over a CTA, in every thread; each warp does the last part for itself. `shared` has one state per
// warp and must not be in use before or after without a barrier.
template <int kThreads>
__device__ SoftmaxState merge_across_block(SoftmaxState s, SoftmaxState* shared, float scale) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32);
  const int lane = threadIdx.x % 32;
  s = merge_across_warp(s, scale);
  if (lane == 0) shared[threadIdx.x / 32] = s;
  __syncthreads();
  return merge_across_warp(lane < kWarps ? shared[lane] : empty_state(), scale);
}

}  // namespace entrgi
