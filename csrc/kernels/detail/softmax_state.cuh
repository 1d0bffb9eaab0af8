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

#include "numeric.cuh"
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

__device__ __forceinline__ void absorb(SoftmaxState& s, const float (&z)[kVector], int first_id,
                                       float scale) {
  float largest = z[0];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    largest = fmaxf(largest, z[i]);
    bad |= !(z[i] < CUDART_INF_F);
  }
  s.bad |= bad;
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
    const float e = exp2_approx(d * kLog2e), e_tau = exp2_approx(d * scale);
    sum += e;
    weighted += d * e;
    sum_tau += e_tau;
    weighted_tau += d * e_tau;
  }
  s.sum += sum;
  s.weighted += weighted;
  s.sum_tau += sum_tau;
  s.weighted_tau += weighted_tau;
}

__device__ __forceinline__ SoftmaxState merge(SoftmaxState a, SoftmaxState b, float scale) {
  if (b.max > a.max ||
      (b.max == a.max && static_cast<uint32_t>(b.argmax) < static_cast<uint32_t>(a.argmax))) {
    a.argmax = b.argmax;
  }
  const float max = fmaxf(a.max, b.max);
  rescale(a, max, scale);
  rescale(b, max, scale);
  a.sum += b.sum;
  a.weighted += b.weighted;
  a.sum_tau += b.sum_tau;
  a.weighted_tau += b.weighted_tau;
  a.allowed_max = fmaxf(a.allowed_max, b.allowed_max);
  a.bad |= b.bad;
  return a;
}

// The state of another lane; `shuffle` moves one 32-bit value.
template <typename Shuffle>
__device__ __forceinline__ SoftmaxState exchange(const SoftmaxState& s, Shuffle shuffle) {
  return {shuffle(s.max),          shuffle(s.sum),         shuffle(s.weighted), shuffle(s.sum_tau),
          shuffle(s.weighted_tau), shuffle(s.allowed_max), shuffle(s.argmax),   shuffle(s.bad)};
}

// The merge over a CTA, in every thread; each warp does the last part for itself. `shared` has one state per
// warp and must not be in use before or after without a barrier.
template <int kThreads>
__device__ SoftmaxState merge_across_block(SoftmaxState s, SoftmaxState* shared, float scale) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);
  const int lane = threadIdx.x % 32;
  int delta = 16;
  const auto down = [&](auto x) { return __shfl_down_sync(~0u, x, delta); };
#pragma unroll 1
  for (; delta > 0; delta /= 2) s = merge(s, exchange(s, down), scale);
  if (lane == 0) shared[threadIdx.x / 32] = s;
  __syncthreads();
  s = lane < kWarps ? shared[lane] : empty_state();
#pragma unroll 1
  for (delta = kWarps / 2; delta > 0; delta /= 2) s = merge(s, exchange(s, down), scale);
  return exchange(s, [](auto x) { return __shfl_sync(~0u, x, 0); });
}

}  // namespace entrgi
